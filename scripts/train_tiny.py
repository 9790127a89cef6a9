"""Trains the included checkpoint tiny/ from scratch, on the CPU: about three quarters of an hour.

    python -m scripts.train_tiny
    python -m scripts.train_tiny --layers 8 --limit 10 --steps 2000 --out runs/eight --state runs/8.safetensors

A 12-layer decoder learns the sums that data.py generates, of 2 to 5 numbers: levels 1 to 3 have 3 to 5. Levels 4 and 5
are longer than anything it sees here, and test problems are never trained on, at any level. Every step's batch follows
from the seed and the number of the step. The state is saved now and then; the same command resumes from there.
"""
import json
import random
from pathlib import Path

import cola
import torch
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import trange

import data
from model import Config, Llama
from scripts import common

LENGTHS = (2, 3, 4, 5)  # how many numbers; levels 1 to 3 lie inside, levels 4 and 5 beyond
CYCLES = (5 / 7, 1)  # shares of the steps at which the learning rate has come down to zero
END = "<|endoftext|>"


def sums(rng, n_terms, count, limit):
    """`count` (prompt, answer) pairs that are not test problems, of numbers below the limit."""
    pairs = []
    while len(pairs) < count:
        question, answer = data.random_sum(rng, n_terms, limit)
        if not data.is_test(question):
            pairs.append((data.Problem("", question, answer).prompt, f" {answer}"))
    return pairs


def make_tokenizer():
    """Byte-level BPE: digits stand alone, the words of the prompt become one token each, all other text is bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\n?\w+:|[0-9]"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    text = [prompt + answer for prompt, answer in sums(random.Random(0), LENGTHS[-1], 300, data.NUMBERS_BELOW)]
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=512, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), special_tokens=[END],
        show_progress=False))
    return tokenizer


def make_model(vocab_size, n_layers, seed):
    torch.manual_seed(seed)
    model = Llama(Config(vocab_size=vocab_size, hidden_size=64, intermediate_size=176, num_hidden_layers=n_layers,
                         num_attention_heads=2, rms_norm_eps=1e-6, max_position_embeddings=512,
                         tie_word_embeddings=True))
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 if "embed" in name else (2 * n_layers if into_residual else 1) ** -0.5 * weight.shape[1] ** -0.5
            torch.nn.init.normal_(weight, std=std)
    return model


def make_batch(tokenizer, pairs):
    """Token ids [B, T], padded on the right, and targets [B, T]: the answer and the end token, -100 elsewhere."""
    prompts = [encoding.ids for encoding in tokenizer.encode_batch([prompt for prompt, _ in pairs])]
    wholes = [encoding.ids + [0] for encoding in tokenizer.encode_batch([prompt + answer for prompt, answer in pairs])]
    tokens = torch.zeros(len(pairs), max(map(len, wholes)), dtype=torch.long)
    targets = torch.full_like(tokens, -100)
    for row, (prompt, whole) in enumerate(zip(prompts, wholes)):
        tokens[row, :len(whole)] = torch.tensor(whole)
        targets[row, len(prompt) - 1:len(whole) - 1] = torch.tensor(whole[len(prompt):])
    return tokens, targets


def save_tensors(tensors, path, **metadata):
    """Writes a .safetensors file (safetensors.torch.save_file would do it too, but needs numpy)."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    serialize_file({name: TensorSpec(dtype=str(tensor.dtype).removeprefix("torch."), shape=list(tensor.shape),
                                     data_ptr=tensor.data_ptr(), data_len=tensor.nbytes)
                    for name, tensor in tensors.items()}, str(path), metadata)
    Path(path).chmod(0o644)  # it was made for its owner alone


def state(model, optimizers):
    """Everything that training has changed, as one flat dict of tensors (safetensors holds no other)."""
    tensors = {f"model.{name}": weight for name, weight in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        for j, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{name}": value for name, value in slots.items()}
    return tensors


def save_checkpoint(folder, model, tokenizer):
    """Writes the ordinary Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {name: value for name, value in vars(model.config).items() if value}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": "float32",
              "eos_token_id": 0, **config}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_tensors({f"model.{name}": weight for name, weight in model.named_parameters()}, folder / "model.safetensors",
                 format="pt")


def print_accuracy(folder, levels):
    """The table of tiny/README.md."""
    model, tokenizer = Llama.from_pretrained(folder, "cpu"), data.Tokenizer(folder)
    print("| level | numbers | correct |\n|---|---|---|")
    for (level, n_terms), problems in zip(data.TERMS_OF_LEVEL.items(), levels):
        samples = [cola.Sample(model, tokenizer, problem) for problem in problems]
        correct = sum(sample.verify([range(len(model.layers))])[0] for sample in samples)
        print(f"| {level} | {n_terms} | {100 * correct / len(samples):.1f} % |")


def read_state(path, run):
    """The steps done and the tensors of a saved state. Raises ValueError if it is malformed or of another run."""
    try:
        with safe_open(path, "pt") as saved:
            about, tensors = saved.metadata() or {}, {name: saved.get_tensor(name) for name in saved.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); give another --state") from None
    if about.get("run") != run:
        raise ValueError(f"{path} is not the state of a run with these settings; give another --state")
    return int(about["step"]), tensors


def parser():
    p = cola.Parser("python -m scripts.train_tiny", __doc__)
    p.add_argument("--out", type=Path, default=Path("tiny"), metavar="FOLDER",
                   help="where to write the checkpoint (default: %(default)s)")
    p.add_argument("--state", type=Path, default=Path("runs/train_tiny.safetensors"), metavar="FILE",
                   help="where to go on from (default: %(default)s)")
    p.add_argument("--layers", type=cola.at_least(1), default=12, metavar="N",
                   help="of the model (default: %(default)s)")
    p.add_argument("--limit", type=cola.at_least(10), default=data.NUMBERS_BELOW, metavar="N",
                   help="numbers are below it (default: %(default)s)")
    p.add_argument("--steps", type=cola.at_least(1), default=7000, metavar="N",
                   help="to train (default: %(default)s)")
    p.add_argument("--batch", type=cola.at_least(1), default=256, metavar="N",
                   help="problems a step (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and sums (default: %(default)s)")
    return p


def main(args):
    run = str((args.layers, args.limit, args.steps, args.batch, args.seed))
    start, tensors = read_state(args.state, run) if args.state.exists() else (0, {})

    tokenizer = make_tokenizer()
    model = make_model(tokenizer.get_vocab_size(), args.layers, args.seed)
    hidden = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim == 1 or "embed" in name]
    # Muon (Jordan et al. 2024) for the matrices: in short trials it learned faster than AdamW alone.
    optimizers = [torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1),
                  torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.98), weight_decay=0)]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]

    if tensors:
        model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items() if name[0] == "m"},
                              strict=False)
        for i, optimizer in enumerate(optimizers):
            slots = {}
            for name, tensor in tensors.items():
                if name.startswith(f"optimizer.{i}."):
                    j, slot = name.split(".")[2:]
                    slots.setdefault(int(j), {})[slot] = tensor
            optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})

    for folder in (args.state.parent, args.out):
        common.make_folder(folder)
    for step in (bar := trange(start, args.steps, initial=start, total=args.steps, mininterval=1)):
        rng = random.Random(f"{args.seed}/{step}")
        tokens, targets = make_batch(tokenizer, sums(rng, rng.choice(LENGTHS), args.batch, args.limit))
        rows, positions = (targets >= 0).nonzero(as_tuple=True)
        logits = model.lm_head(model.hidden(tokens)[rows, positions])
        loss = F.cross_entropy(logits, targets[rows, positions])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        end = next(share * args.steps for share in CYCLES if step < share * args.steps)
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 200, 1 - step / end)
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            partial = args.state.with_suffix(".part")
            save_tensors(state(model, optimizers), partial, step=str(step + 1), run=run)
            partial.replace(args.state)
    save_checkpoint(args.out, model, tokenizer)
    levels = [data.arithmetic(level, 500, limit=args.limit) for level in data.TERMS_OF_LEVEL]
    if args.limit != data.NUMBERS_BELOW:  # then it needs problems of its own
        rows = [{"question": p.question, "answer": p.answer, "level": p.level} for p in data.by_turns(levels)]
        (args.out / "arithmetic.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print_accuracy(args.out, levels)


if __name__ == "__main__":
    cola.exit_on_error("train_tiny", main, parser().parse_args())
