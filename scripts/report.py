"""Prints what studies found, as a Markdown table, with the claims of the paper (arXiv 2507.07996) beside it.

    python -m scripts.report runs/*.jsonl
    python -m scripts.report runs/math.jsonl --polar PoLar/data
    python -m scripts.report runs/math.jsonl --drllm dr-llm/data/train

A study's ranks are read along with it, and a sample that stands in two files counts once. The rows:
  accuracy: with CoLa a sample is right if any chain is, a best chain then, which plain generation confirmed.
  finding 1: of the samples that the full model gets right, those whose best chain is shorter; what the best chains of
    all right samples save.
  finding 2: of the samples that it gets wrong, those corrected; of the same, those for which the same search reached
    the decoy, a wrong answer; the lift is the difference, over the wrong samples that have a decoy.
  depth: of the best chains, in layers; a sample still wrong has none and counts with the full depth.
  best chains: it skips if it leaves out a layer before its deepest one, loops if a layer stands in it more than once,
    stops early if the model's last layer is not in it.
  elsewhere: the best chain and, on the same questions, the full model; the choices in another order or, where the
    answer is free, other problems of the level. The intervals take these questions as independent.
Intervals are of 95 %: Wilson for a share, normal for a mean (after ±), Newcombe's of paired shares for the lift.

--polar writes training data of PoLar (github.com/tianyi-lab/PoLar), for its --data_root: a file for each of its
difficulties, the levels 1 to 5; samples without a level stand under their dataset's name. PoLar reads a chain only if
it is a row of blocks of 1 to 4 layers in the model's order, each skipped, run, or run twice; other chains are left out
and counted.

--drllm writes training data of Dr.LLM (github.com/parameterlab/dr-llm), a file for each model and dataset: of each
sample the shallowest correct chain that runs the layers in the model's order, each at most twice in a row. Its routers
can choose no other.
"""
import json
import sys
from pathlib import Path

import cola
from scripts import common
from scripts.common import lift, mean

CLAIMS = {"finding 1: right samples with a shorter chain": "> 75 %", "finding 2: wrong samples corrected": "> 60 %"}

CHAINS = "final_valid_transitions", "final_invalid_transitions"


def parser():
    p = cola.Parser("python -m scripts.report", __doc__)
    p.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what scripts.study wrote, .jsonl or .jsonl.gz")
    p.add_argument("--polar", type=Path, metavar="DIR", help="also write training data of PoLar here")
    p.add_argument("--drllm", type=Path, metavar="DIR", help="also write training data of Dr.LLM here")
    return p


def share(flags):
    """A share with its interval and counts, as text."""
    return f"{common.share(flags)}, {sum(flags)} of {len(flags)}" if flags else "-"


def depth(lines):
    """Mean depth of the best chains, the full depth where there is none, as text."""
    layers = {line["n_layers"] for line in lines}
    if len(layers) != 1:
        return "-"  # layers of different models are no common unit
    full = layers.pop()
    return f"{mean([full if line['best'] is None else len(line['best']) for line in lines])} of {full}"


def elsewhere(lines, who):
    """The share of other questions that "right" (the best chains) or "full_right" (the full model) gets right."""
    asked = [line["reorder"] for line in lines if line["reorder"]]
    hits = sum(other[who] for other in asked)
    return share([True] * hits + [False] * (sum(other["asked"] for other in asked) - hits))


def rows(lines):
    """{label: figure, as text}"""
    right = [line for line in lines if line["initial_score"]]
    wrong = [line for line in lines if not line["initial_score"]]
    corrected = [line for line in wrong if line["best"] is not None]
    pairs = [(line["best"] is not None, line["decoy"]["found"]) for line in wrong if line["decoy"]]
    best = [(line["best"], line["n_layers"]) for line in right + corrected]
    return {
        "samples": str(len(lines)),
        "accuracy, full model": share([bool(line["initial_score"]) for line in lines]),
        "accuracy with CoLa": share([line["best"] is not None for line in lines]),
        "finding 1: right samples with a shorter chain": share(
            [len(line["best"]) < line["n_layers"] for line in right]),
        "their layers saved, in %": mean([100 * (1 - len(line["best"]) / line["n_layers"]) for line in right]),
        "finding 2: wrong samples corrected": share([line["best"] is not None for line in wrong]),
        "their decoys reached": share([decoy for _, decoy in pairs]),
        "lift": lift(pairs),
        "depth, right samples": depth(right),
        "depth, corrected samples": depth(corrected),
        "depth, all samples": depth(lines),
        "best chains that skip": share(
            [any(layer not in chain for layer in range(max(chain, default=0))) for chain, _ in best]),
        "best chains that loop": share([len(set(chain)) < len(chain) for chain, _ in best]),
        "best chains that stop early": share([n_layers - 1 not in chain for chain, n_layers in best]),
        "elsewhere, right samples: best chain": elsewhere(right, "right"),
        "elsewhere, right samples: full model": elsewhere(right, "full_right"),
        "elsewhere, corrected samples: best chain": elsewhere(corrected, "right"),
        "elsewhere, corrected samples: full model": elsewhere(corrected, "full_right")}


def bare(answer):
    """The answer without its box: PoLar and Dr.LLM compare it with what stands in the model's box."""
    return answer.removeprefix("\\boxed{").removesuffix("}") if answer.startswith("\\boxed{") else answer


def write_json(files):
    """Writes {path: content}."""
    for file, content in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content), encoding="utf-8")


def write_polar(folder, lines):
    files = {}
    for line in lines:
        diff, settings = line["level"], line["settings"]
        name = f"dart-math-diff-{diff}" if diff in range(1, 6) else settings["dataset"].removesuffix(".jsonl")
        file = files.setdefault(folder / settings["model"] / name / "merged_mcts_samples.json", {"samples": []})
        file["samples"].append({"id": line["id"], "question": line["question"], "gt_ans": bare(line["gt_ans"]),
                                "initial_score": line["initial_score"]}
                               | {field: [*filter(common.readable, line[field])] for field in CHAINS})
    samples = [sample for file in files.values() for sample in file["samples"]]
    kept, found = ([sum(len(line[field]) for line in of) for field in CHAINS] for of in (samples, lines))
    if not kept[0]:
        raise ValueError("PoLar can read none of the correct chains; search among those that it can read: "
                         "python -m scripts.study --polar")
    write_json(files)
    for file, content in files.items():
        print(f"{file}: {len(content['samples'])} samples", file=sys.stderr)
    print(f"left out, as PoLar cannot read them: {found[0] - kept[0]} of {found[0]} valid chains, "
          f"{found[1] - kept[1]} of {found[1]} invalid ones", file=sys.stderr)


def write_drllm(folder, lines):
    files, taken = {}, 0
    for line in lines:
        chains = [chain for chain in line["final_valid_transitions"]
                  if chain == sorted(chain) and all(chain.count(layer) <= 2 for layer in chain)]
        if chains:
            settings, taken = line["settings"], taken + 1
            name = f"{settings['model']}-{settings['dataset'].removesuffix('.jsonl')}.json".replace("/", "--")
            file = files.setdefault(folder / name, {
                "model_name": settings["model"], "dataset": settings["dataset"], "questions": [], "best_path": [],
                "best_response": [], "original_correct": []})
            for field, value in [("questions", line["question"]), ("best_path", min(chains, key=len)),
                                 ("best_response", bare(line["gt_ans"])),
                                 ("original_correct", int(line["initial_score"]))]:
                file[field].append(value)
    if not files:
        raise ValueError("Dr.LLM can use none of the correct chains; search with more --simulations")
    write_json(files)
    for file, content in files.items():
        print(f"{file}: {len(content['questions'])} samples", file=sys.stderr)
    print(f"left out, as they have no chain that Dr.LLM can use: {len(lines) - taken} samples", file=sys.stderr)


def main(args):
    studies = common.studies(args.files)
    lines = [line for study in studies.values() for line in study]
    columns = {title: rows(study) for title, study in studies.items()}
    if len(columns) > 1:
        columns["total"] = rows(lines)
    print(f"| | {' | '.join(columns)} | paper |\n|---|{'---:|' * len(columns)}---:|")
    for label in rows(lines):
        print(f"| {' | '.join([label, *(column[label] for column in columns.values()), CLAIMS.get(label, '')])} |")
    if args.polar:
        write_polar(args.polar, lines)
    if args.drllm:
        write_drllm(args.drllm, lines)


if __name__ == "__main__":
    cola.exit_on_error("report", main, parser().parse_args())
