"""Search for a short chain of layers with which a model answers one sample correctly.

    python cola.py --sample-id 12
    python cola.py --sample-id 12 --chain 0-5,5,8-11
    python cola.py --sample-id 3 --model path/to/checkpoint --dataset path/to/arc_easy.jsonl

Layers are numbered from 0; a chain is written 0-5,5,8-11. The method is CoLa (arXiv 2507.07996).
"""
import argparse
import os
import sys
import time
import warnings
from itertools import groupby
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch warns, but nothing here needs it
# How long a waiting torch thread spins; read when torch is imported. The default starves others on a busy machine.
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
        if not least <= number(text) < float("inf"):
            raise argparse.ArgumentTypeError(f"must be {least} or more, not {text}")
        return number(text)
    return numeric


def parser():
    p = Parser("cola.py", __doc__, usage="%(prog)s --sample-id N [options]")
    add = p.add_argument_group("sample").add_argument
    add("--sample-id", type=int, required=True, metavar="N", help="position in the dataset, from 0")
    add("--chain", metavar="LAYERS", help="run this chain instead of searching, such as 0-5,5,8-11")
    add_problem_arguments(p)
    add_model_arguments(p)
    add_search_arguments(p)
    return p


def add_problem_arguments(p):
    """The arguments of `data.load`, for cola.py and the scripts."""
    add = p.add_argument_group("problems").add_argument
    add("--dataset", default="arithmetic", metavar="NAME",
        help=f"{', '.join(data.DATASETS)}, or a JSON Lines file (default: %(default)s)")
    add("--shots", type=int, default=0, metavar="N", help="worked examples before the question (default: %(default)s)")
    add("--boxed", type=Path, metavar="FILE", help="file with a prompt for \\boxed{ANSWER}, with {question} in it")
    add("--split", choices=["train", "validation", "test"], help="for arc and gsm8k (default: test)")


def add_model_arguments(p):
    """The arguments of `load_checkpoint` and `Sample`, for cola.py and the scripts."""
    add = p.add_argument_group("model").add_argument
    add("--model", default="tiny", metavar="NAME",
        help="a checkpoint folder, or an org/name on the hub (default: the included tiny)")
    add("--revision", metavar="NAME", help="branch, tag or commit on the hub (default: main)")
    add("--no-chat", action="store_true", help="prompt a chat model like a base model")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--dtype", choices=["float32", "bfloat16", "float16"],
        help="default: bfloat16 on cuda, float32 on cpu; bfloat16 is faster on a cpu with instructions for it")
    add("--cache-mb", type=at_least(0), default=1024, metavar="N",
        help="memory for hidden states that chains share, in megabytes (default: %(default)s)")


def add_search_arguments(p):
    """The arguments of `search`, for cola.py and the scripts."""
    add = p.add_argument_group("search").add_argument
    add("--search", choices=["uct", "blind", "random"], default="uct", help="uct, or a control: blind ignores how "
        "likely a wrong chain makes the answer, random draws around the full-depth chain (default: %(default)s)")
    add("--simulations", type=at_least(1), default=200, metavar="N",
        help="distinct chains to evaluate (default: %(default)s)")
    add("--depth-penalty", type=at_least(0, float), default=0.2, metavar="X",
        help="reward lost at full depth; a correct answer earns 1 (default: %(default)s)")
    add("--exploration", type=at_least(0, float), default=0.5, metavar="C",
        help="constant c of the upper confidence bound (default: %(default)s)")
    add("--max-skip", type=at_least(0), metavar="N", help="most layers that one step may skip (default: any number)")
    add("--max-loop", type=at_least(0), default=4, metavar="N",
        help="most layers that one step may go back; 1 repeats the last (default: %(default)s)")
    add("--batch", type=at_least(1), default=8, metavar="N", help="chains to verify at a time (default: %(default)s)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="random seed (default: %(default)s)")


def load_checkpoint(args):
    """The model and its tokenizer; also sets a suitable number of threads. Raises ValueError or OSError."""
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
        ends = [end.strip() for end in part.split("-", 1)]  # one or two
        if not all(map(str.isdecimal, ends)) or int(ends[0]) > int(ends[-1]):
            raise ValueError(f"chain {text!r} has a malformed part {part!r}; write layers and ranges: 0-5,5,8-11")
        check_chain([int(ends[-1])], n_layers)
        chain += range(int(ends[0]), int(ends[-1]) + 1)
    return tuple(chain)


def format_chain(chain):
    """The inverse of `parse_chain`. Within a run of successive layers, layer minus step is constant."""
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(chain), lambda step: step[1] - step[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def draw(chain, n_layers):
    """A chain as lines of text; each loop back begins a new line. ".": skipped in that line; "x": cut off at the end.

        layers   0 1 2 3 4 5
        first    0 1 . 3
        then         2 3 x x
    """
    rows, top, width = [[*range(n_layers)], []], max(chain, default=-1), len(str(n_layers - 1)) + 1
    for layer in chain:
        if layer < len(rows[-1]):  # a loop back
            rows.append([""] * layer)
        rows[-1] += ["."] * (layer - len(rows[-1])) + [layer]
    rows[-1] += [""] * (top + 1 - len(rows[-1])) + ["x"] * (n_layers - 1 - top)
    labels = ["layers", "first", *["then"] * len(rows)]
    return [f"{label:8}" + "".join(f"{cell:>{width}}" for cell in row).rstrip() for label, row in zip(labels, rows)]


class Sample:
    """A problem as one model sees it.

    Attributes:
      prompt, target: token ids of the prompt and of the correct answer after it.
      stop: set of ids, one of which must follow the answer; None for a box, or a label that begins no other.
      ends: set of ids of the tokens with a line break, such as ")\\n", or, for a box, a closing brace.
      verify, fused: the Verifier of this answer, and its argument `fused`.
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
        complete = sum(label.startswith(problem.answer) for label in problem.choices) == 1
        self.stop = None if complete or problem.form else tokenizer.stop
        self.ends = {i for i, text in tokenizer.texts.items() if "\n" in text or problem.form and "}" in text}
        self.fused = {i for i in self.ends - {self.target[-1]}
                      if data.exact_match(self.read([*self.target[:-1], i]), problem.answer)}
        self.verify = Verifier(model, self.prompt, self.target, self.stop, cache_mb, self.fused)

    def answer(self, chain):
        """The text that greedy decoding writes under a chain, and whether it is the correct one, `problem.answer`."""
        limit = max(32, len(self.target) + 1) if self.stop is not None or self.problem.form else len(self.target)
        ids = self.model.generate(self.prompt, chain, limit, self.tokenizer.stop, self.ends)
        ended = self.stop is None or len(ids) < limit or ids[-1] in self.ends  # not cut off at the limit
        text = self.read(ids)
        return text, ended and data.exact_match(text, self.problem.answer)

    def read(self, ids):
        """The answer that generated ids spell: their text up to a line break or, for a box, its closing brace."""
        text = self.tokenizer.decode(ids).partition("\n")[0].strip()
        return "".join(text.partition("}")[:2]) if self.problem.form else text


def say(label, text):
    """Prints text with a label in the left margin."""
    print(f"{label:10}" + text.replace("\n", "\n" + " " * 10))


def say_answer(label, sample, chain, drawn=True):
    """Prints what a chain answers and, if drawn, the chain: in the form of --chain and as a drawing."""
    n_layers, (text, correct) = len(sample.model.layers), sample.answer(chain)
    say(label, f"{text!r}, {'correct' if correct else 'wrong'}, depth {len(chain)} (full: {n_layers})")
    if drawn:
        say("chain", "\n".join([format_chain(chain), *draw(chain, n_layers)]))


def search(args, score, n_layers, seed, departures=None, **options):
    """`mcts.search` with the settings that the arguments give; departures: a function that returns the weights."""
    return mcts.search(score, n_layers, simulations=args.simulations, seed=seed, depth_penalty=args.depth_penalty,
                       exploration=args.exploration, max_skip=args.max_skip, max_loop=args.max_loop, batch=args.batch,
                       learn=args.search != "random", promise=args.search == "uct",
                       departures=departures() if departures and args.search == "uct" else None, **options)


def search_chain(args, sample):
    """Searches for the sample's chain, with a progress bar, and prints what it finds."""
    start = time.perf_counter()
    with tqdm(total=args.simulations, desc="search", unit="chain", disable=None, leave=False) as bar:
        def score(chains):
            scores = sample.verify.score(chains)
            bar.update(len(chains))
            return scores
        result = search(args, score, len(sample.model.layers), args.seed, sample.verify.departures)
    seconds, correct = time.perf_counter() - start, result.correct()
    say("search", f"{len(result.evaluated)} chains evaluated, {len(correct)} correct, in {seconds:.2f} s, "
                  f"{len(result.evaluated) / seconds:.1f} chains/s\n"
                  f"{sample.verify.steps_run} layer steps run of {sample.verify.steps_asked}, the rest were shared")
    discarded = next((i for i, chain in enumerate(correct) if sample.answer(chain)[1]), len(correct))  # by `generate`
    if discarded == len(correct):
        say("best", "none: no correct chain found")
    else:
        say_answer("best", sample, correct[discarded])
    if discarded:
        say("discarded", f"{discarded} that `generate` did not confirm")


def run(args):
    problems = data.load(args.dataset, args.shots, args.split, args.boxed)
    if not 0 <= args.sample_id < len(problems):
        raise ValueError(f"sample id {args.sample_id} is out of range; {args.dataset} has 0 to {len(problems) - 1}")
    problem, (model, tokenizer) = problems[args.sample_id], load_checkpoint(args)
    sample = Sample(model, tokenizer, problem, args.cache_mb)
    n_layers, weight = model.config.num_hidden_layers, model.lm_head.weight
    size = sum(parameter.numel() for parameter in model.parameters())
    chain = None if args.chain is None else parse_chain(args.chain, n_layers)
    say("model", f"{args.model}: {n_layers} layers, {size / 1e6:.1f}M parameters, {weight.device}, "
                 f"{str(weight.dtype).removeprefix('torch.')}")
    say("sample", f"{args.dataset} {args.sample_id} ({problem.id}), "
                  f"{'chat' if tokenizer.chat else 'plain'} prompt of {len(sample.prompt)} tokens")
    say("question", problem.question)
    say("gold", problem.answer)
    if chain is None:
        say_answer("full", sample, range(n_layers), drawn=False)
        search_chain(args, sample)
    else:
        say_answer("answer", sample, chain)


def exit_on_error(program, command, *arguments):
    """Runs a command. Bad input, an unreachable hub or too little memory ends in one line on stderr and code 2."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # the user may have closed it
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout has no such method
        sys.stdout.reconfigure(errors="replace")  # the terminal may lack a character
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
        text = " ".join(str(error).split())
        if isinstance(error, MemoryError) or any(s in text for s in ("out of memory", "CPUAllocator", "ALLOC_FAILED")):
            text = "the device has too little memory; use a smaller model, --cache-mb or --batch, or another --device"
        elif isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}; give another path"
        elif isinstance(error, HTTPError) and not isinstance(error, OSError):  # a reply from the hub is both
            text = f"the hub cannot be reached ({text}); try again later"
        elif not isinstance(error, (ValueError, OSError)):  # a bug
            raise
        print(f"{program}: {text}", file=sys.stderr)
        sys.exit(2)


def main(argv=None):
    exit_on_error("cola.py", run, parser().parse_args(argv))


if __name__ == "__main__":
    main()
