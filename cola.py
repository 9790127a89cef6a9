"""Search for a short chain of layers with which a model answers one sample correctly.

    python cola.py --sample-id 12
    python cola.py --sample-id 12 --chain 0-5,5,8-11
    python cola.py --sample-id 3 --model path/to/checkpoint --dataset path/to/arc_easy.jsonl

Follows CoLa (arXiv 2507.07996): the layers of a pretrained LLM are modules that may be skipped, looped and
reordered for each input, without training. Layers are numbered from 0; a chain is written 0-5,5,8-11.
"""
import argparse
import math
import os
import re
import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch warns, but nothing here needs it
# How long a waiting torch thread spins before it sleeps; read when torch is imported. The default is milliseconds, in
# which it keeps the very thread that it waits for from running if the machine is busy.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
try:
    import torch
    from huggingface_hub.errors import HTTPError
    from tqdm import tqdm

    import data
    import mcts
    from model import Llama, Verifier, check_chain, fetch
except KeyboardInterrupt:  # importing torch takes seconds
    print("interrupted", file=sys.stderr)
    sys.exit(130)

THREADS = torch.get_num_threads()  # OMP_NUM_THREADS, or one per core
TINY = Path(__file__).resolve().parent / "tiny"  # the included checkpoint


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that keeps the line breaks of its description, and reports an error in one line."""

    def __init__(self, prog, description, **settings):
        super().__init__(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False, **settings)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def at_least(least, number=int):
    """The type of a numeric argument that must be `least` or more."""
    def numeric(text):  # argparse names it if the text is not a number
        if not least <= number(text) < math.inf:
            raise argparse.ArgumentTypeError(f"must be {least} or more, not {text}")
        return number(text)
    return numeric


def parser():
    p = Parser("cola.py", __doc__, usage="%(prog)s --sample-id N [options]")
    sample = p.add_argument_group("sample")
    sample.add_argument("--sample-id", type=int, required=True, metavar="N", help="position in the dataset, from 0")
    sample.add_argument("--chain", metavar="LAYERS", help="run this chain instead of searching, such as 0-5,5,8-11")
    add_problem_arguments(p)
    add_model_arguments(p)
    add_search_arguments(p)
    return p


def add_problem_arguments(p):
    """The arguments of `data.load`, for cola.py and the scripts."""
    problems = p.add_argument_group("problems")
    problems.add_argument("--dataset", default="arithmetic", metavar="NAME",
                          help=f"{', '.join(data.DATASETS)}, or a JSON Lines file (default: %(default)s)")
    problems.add_argument("--shots", type=int, default=0, metavar="N",
                          help="worked examples before the question (default: %(default)s)")
    problems.add_argument("--boxed", type=Path, metavar="FILE",
                          help="ask for \\boxed{ANSWER} with the prompt in this file, which contains {question}")
    problems.add_argument("--split", choices=["train", "validation", "test"], metavar="NAME",
                          help="train, validation or test, for arc and gsm8k (default: test)")


def add_model_arguments(p):
    """The arguments of `load_checkpoint` and `Sample`, for cola.py and the scripts."""
    model = p.add_argument_group("model")
    model.add_argument("--model", default="tiny", metavar="NAME",
                       help="a checkpoint folder, or an org/name on the hub (default: the included tiny)")
    model.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub (default: main)")
    model.add_argument("--no-chat", action="store_true", help="prompt a chat model like a base model")
    model.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    model.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], metavar="NAME",
                       help="float32, bfloat16 or float16 (default: bfloat16 on cuda, float32 on cpu, where bfloat16 "
                            "is faster if the cpu has instructions for it)")
    model.add_argument("--cache-mb", type=at_least(0), default=1024, metavar="N",
                       help="megabytes of hidden states to share between chains (default: %(default)s)")


def add_search_arguments(p):
    """The arguments of `search`, for cola.py and the scripts."""
    search = p.add_argument_group("search")
    search.add_argument("--search", choices=["uct", "blind", "random"], default="uct", metavar="NAME",
                        help="uct, or a control: blind ignores how likely chains make the answer, random draws "
                             "chains around the full-depth chain (default: uct)")
    search.add_argument("--simulations", type=at_least(1), default=200, metavar="N",
                        help="distinct chains to evaluate (default: %(default)s)")
    search.add_argument("--depth-penalty", type=at_least(0, float), default=0.2, metavar="X",
                        help="what the full depth costs; a correct answer is worth 1 (default: %(default)s)")
    search.add_argument("--exploration", type=at_least(0, float), default=8.0, metavar="C",
                        help="constant c of the upper confidence bound (default: %(default)s)")
    search.add_argument("--max-skip", type=at_least(0), metavar="N",
                        help="layers that a step may skip (default: any number)")
    search.add_argument("--max-loop", type=at_least(0), default=4, metavar="N",
                        help="layers that a step may go back; 1 repeats the last (default: %(default)s)")
    search.add_argument("--batch", type=at_least(1), default=8, metavar="N",
                        help="chains to verify at a time (default: %(default)s)")
    search.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: %(default)s)")


def load_checkpoint(args):
    """The model and its tokenizer; also sets the number of threads that suits them.

    Raises ValueError or OSError with one line that says what to do.
    """
    folder = fetch(TINY if args.model == "tiny" else args.model, args.revision)
    model = Llama.from_pretrained(folder, args.device, args.dtype and getattr(torch, args.dtype))
    # Below 500,000 weights per layer, waking several threads costs more than they save.
    large = sum(weight.numel() for weight in model.layers[0].parameters()) > 500_000
    torch.set_num_threads(THREADS if large or "OMP_NUM_THREADS" in os.environ else 1)
    return model, data.Tokenizer(folder, chat=not args.no_chat)


def parse_chain(text, n_layers):
    """"0-5,5,8-11" as a tuple of layers; an empty text is the empty chain. Raises ValueError if malformed."""
    chain = []
    for part in text.split(",") if text.strip() else []:
        first, dash, last = map(str.strip, part.partition("-"))
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise ValueError(f"chain {text!r} has a malformed part {part!r}; write layers and ranges: 0-5,5,8-11")
        check_chain([int(last)], n_layers)
        chain += range(int(first), int(last) + 1)
    return tuple(chain)


def format_chain(chain):
    """The inverse of `parse_chain`."""
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0])
                    for run in runs(chain, lambda a, b: b == a + 1))


def runs(chain, joined):
    """Splits a chain into runs in which all neighbours are `joined`."""
    out = []
    for layer in chain:
        if not (out and joined(out[-1][-1], layer)):
            out.append([])
        out[-1].append(layer)
    return out


def draw(chain, n_layers):
    """A chain as lines of text; each loop back begins a new line. "." is skipped in its line, "x" cut off at the end.

        layers   0 1 2 3 4 5
        first    0 1 . 3
        then         2 3 x x
    """
    rows, top, width = [[*range(n_layers)]], max(chain, default=-1), len(str(n_layers - 1)) + 1
    for layers in runs(chain, lambda a, b: b > a) or [()]:
        drawn = range(layers[0] if len(rows) > 1 else 0, max(layers, default=-1) + 1)
        rows.append([layer if layer in layers else "." if layer in drawn else "" for layer in range(n_layers)])
    rows[-1][top + 1:] = "x" * (n_layers - 1 - top)
    labels = ["layers", "first", *["then"] * len(rows)]
    return [f"{label:8}" + "".join(f"{cell:>{width}}" for cell in row).rstrip() for label, row in zip(labels, rows)]


def explain(chain, n_layers):
    """What a chain does, in words."""
    top = max(chain, default=-1)
    late = [layer for i, layer in enumerate(chain) if layer not in chain[:i] and layer < max(chain[:i], default=0)]
    parts = [("skips", [layer for layer in range(top) if layer not in chain]),
             ("loops", sorted({layer for layer in chain if chain.count(layer) > 1})),
             ("reorders", sorted(late)),
             ("cuts off", range(top + 1, n_layers))]
    return "; ".join(f"{verb} {format_chain(layers)}" for verb, layers in parts if layers) or "every layer once"


class Sample:
    """A problem as one model sees it.

    Attributes:
      prompt, target: token ids of the prompt and of the correct answer after it.
      stop: set of ids that end an answer; None if it is complete by itself: an answer in a box, or the label of a
        choice unless another label begins with it.
      verify, fused: the Verifier of this answer, and its argument of that name.
    Raises ValueError if the tokenizer does not fit the model or cannot write the answer, or the prompt is too long.
    """

    def __init__(self, model, tokenizer, problem, cache_mb=1024):
        self.model, self.tokenizer, self.problem = model, tokenizer, problem
        self.prompt, self.target = tokenizer.encode(problem)
        if max(self.prompt + self.target, default=0) >= model.config.vocab_size:
            raise ValueError("the tokenizer has more tokens than the model; fetch the checkpoint again")
        if not data.exact_match(written := tokenizer.decode(self.target), problem.answer):  # unknown characters, say
            raise ValueError(f"the tokenizer cannot write the answer {problem.answer!r} of sample {problem.id}, only "
                             f"{written!r}; leave this sample out")
        complete = [label for label in problem.choices if label.startswith(problem.answer)] == [problem.answer]
        self.stop = None if complete or problem.form else tokenizer.stop
        self.fused = tokenizer.closing(self.target) if problem.form else tokenizer.fused(self.target)
        self.verify = Verifier(model, self.prompt, self.target, self.stop, cache_mb, self.fused)

    def answer(self, chain):
        """The text that greedy decoding writes under a chain, and whether it is the correct answer."""
        stop_after = self.tokenizer.breaks.keys() | (self.tokenizer.braces if self.problem.form else set())
        limit = max(32, len(self.target) + 1) if self.stop or self.problem.form else len(self.target)
        ids = self.model.generate(self.prompt, chain, limit, self.tokenizer.stop, stop_after)
        ended = not self.stop or len(ids) < limit or ids[-1] in stop_after
        text = self.read(ids)
        return text, ended and data.exact_match(text, self.problem.answer)

    def read(self, ids):
        """The answer that generated ids spell: their text up to a line break or, of a box, its closing brace."""
        text = self.tokenizer.decode(ids).partition("\n")[0].strip()
        return re.sub("}.*", "}", text) if self.problem.form else text


def load_sample(args):
    """The Sample that the arguments ask for. Raises ValueError or OSError with one line that says what to do."""
    problems = data.load(args.dataset, args.shots, args.split, args.boxed)
    if not 0 <= args.sample_id < len(problems):
        raise ValueError(f"sample id {args.sample_id} is out of range; {args.dataset} has 0 to {len(problems) - 1}")
    return Sample(*load_checkpoint(args), problems[args.sample_id], args.cache_mb)


def say(label, text):
    """Prints text with a label in the left margin."""
    for line in text.splitlines():
        print(f"{label:10}{line}".rstrip())
        label = ""


def say_answer(label, sample, chain):
    """Prints what the model answers under a chain."""
    text, correct = sample.answer(chain)
    say(label, f"{text!r}, {'correct' if correct else 'wrong'}, depth {len(chain)} (full: {len(sample.model.layers)})")


def say_chain(chain, n_layers):
    """Prints a chain: in the form of --chain, in words, and as a drawing."""
    say("chain", "\n".join([format_chain(chain), explain(chain, n_layers), *draw(chain, n_layers)]))


def search(args, score, n_layers, seed, departures=None, **options):
    """`mcts.search` with the settings that the arguments give; departures: a function that returns the weights."""
    return mcts.search(score, n_layers, simulations=args.simulations, seed=seed, depth_penalty=args.depth_penalty,
                       exploration=args.exploration, max_skip=args.max_skip, max_loop=args.max_loop, batch=args.batch,
                       learn=args.search != "random", promise=args.search == "uct",
                       departures=departures() if departures and args.search == "uct" else None, **options)


def search_chain(args, sample):
    """Searches for the sample's chain, with a progress bar, and prints what it finds."""
    n_layers, start = sample.model.config.num_hidden_layers, time.perf_counter()
    with tqdm(total=args.simulations, desc="search", unit="chain", disable=None, leave=False) as bar:
        def score(chains):
            scores = sample.verify.score(chains)
            bar.update(len(chains))
            return scores
        result = search(args, score, n_layers, args.seed, sample.verify.departures)
    seconds = time.perf_counter() - start
    correct = result.correct()
    say("search", f"{len(result.evaluated)} chains evaluated, {len(correct)} correct, in {seconds:.2f} s, "
                  f"{len(result.evaluated) / seconds:.1f} chains/s\n"
                  f"{sample.verify.steps_run} layer steps run of {sample.verify.steps_asked}, the rest were shared")
    best = next((chain for chain in correct if sample.answer(chain)[1]), None)  # `generate` has the last word
    discarded = len(correct) if best is None else correct.index(best)
    if best is None:
        say("best", "none: no correct chain found")
    else:
        say_answer("best", sample, best)
        say_chain(best, n_layers)
    if discarded:
        say("discarded", f"{discarded} chains that `generate` did not confirm")


def run(args):
    """Runs the command."""
    sample = load_sample(args)
    model, problem = sample.model, sample.problem
    n_layers, weight = model.config.num_hidden_layers, model.lm_head.weight
    size = sum(parameter.numel() for parameter in model.parameters())
    chain = None if args.chain is None else parse_chain(args.chain, n_layers)
    say("model", f"{args.model}: {n_layers} layers, {size / 1e6:.1f}M parameters, {weight.device}, "
                 f"{str(weight.dtype).removeprefix('torch.')}")
    say("sample", f"{args.dataset} {args.sample_id} ({problem.id}), "
                  f"{'chat' if sample.tokenizer.chat else 'plain'} prompt of {len(sample.prompt)} tokens")
    say("question", problem.question)
    say("gold", problem.answer)
    if chain is None:
        say_answer("full", sample, range(n_layers))
        search_chain(args, sample)
    else:
        say_answer("answer", sample, chain)
        say_chain(chain, n_layers)


def one_line(error):
    """What is wrong with the input or the machine, and what to do; None for any other error, a bug."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "out of memory" in text or "DefaultCPUAllocator" in text:
        return "the device has too little memory; use a smaller model, --cache-mb or --batch, or another --device"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; give another path"
    if isinstance(error, (ValueError, OSError)):  # those of huggingface_hub say what to do, too
        return text
    return f"the hub cannot be reached ({text}); try again later" if isinstance(error, HTTPError) else None


def exit_on_error(program, command, *arguments):
    """Runs a command; bad input ends in one line on stderr and exit code 2."""
    try:
        command(*arguments)
        print(end="", flush=True)  # so that a closed pipe is noticed here
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # of `| head`, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if one_line(error) is None:
            raise
        print(f"{program}: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def main(argv=None):
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout has no such method
        sys.stdout.reconfigure(errors="replace")  # the terminal may lack a character
    exit_on_error("cola.py", run, parser().parse_args(argv))


if __name__ == "__main__":
    main()
