"""Prints what studies found as Markdown tables, one row per study; the paper is arXiv 2507.07996.

    python -m scripts.report runs/*.jsonl
    python -m scripts.report runs/math.jsonl --levels
    python -m scripts.report runs/math.jsonl --polar PoLar/data
    python -m scripts.report runs/math.jsonl --drllm dr-llm/data/train

Files that the processes of one study wrote are read together, and a sample that occurs twice counts once.

Findings:
  accuracy: of the full model; with CoLa a sample is correct if any chain is, confirmed by `generate`.
  finding 1: of the samples that the full model answers correctly, those with a shorter correct chain (the paper: more
    than 75 %); layers saved: by the best chains of all of these.
  finding 2: of the samples that it answers wrongly, those that some chain corrects (the paper: more than 60 %).
  decoys: of these, how often the same search reached a wrong answer instead; the lift is the difference.
Chains, of the best chains of correct and of corrected samples:
  depth in layers; skip: leaves out a layer before its deepest one; loop: runs a layer more than once; stop early:
  leaves out the last layer; edits: blocks of layers to remove, insert or replace in the full chain to get this one.
  promise: the mean log-probability per token that the full model gives to the correct answer of samples that the search
  corrects, and of those that stay wrong.
Other questions: how often the best chain and the full model answer them correctly: the choices in another order or, for
  free answers, other problems of the level. The intervals take these questions as independent.

Intervals are 95 %: Wilson for a share, normal for a mean (after ±), Newcombe's of paired shares for the lift.

--polar writes training data for PoLar (github.com/tianyi-lab/PoLar), to be its --data_root: a file for each of its
difficulties, the levels 1 to 5; samples without a level go under their dataset's name. PoLar reads a chain only if it
consists of blocks of 1 to 4 layers in the model's order, each skipped, run once or run twice; others are left out.

--drllm writes training data for Dr.LLM (github.com/parameterlab/dr-llm), a file for each model and dataset: for each
sample the shortest correct chain that runs the layers in the model's order, each at most twice in a row. Its routers
can choose no other.
"""
import json
import sys
from difflib import SequenceMatcher
from pathlib import Path

import cola
from scripts import common
from scripts.common import lift, mean, share

CHAINS = "final_valid_transitions", "final_invalid_transitions"


def parser():
    p = cola.Parser("python -m scripts.report", __doc__)
    p.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what scripts.study wrote, .jsonl or .jsonl.gz")
    p.add_argument("--levels", action="store_true", help="one row per level of each study")
    p.add_argument("--polar", type=Path, metavar="DIR", help="also write training data for PoLar here")
    p.add_argument("--drllm", type=Path, metavar="DIR", help="also write training data for Dr.LLM here")
    return p


def edits(line):
    """How many blocks of layers differ between the full chain and the best one."""
    blocks = SequenceMatcher(None, range(line["n_layers"]), line["best"], autojunk=False).get_opcodes()
    return sum(kind != "equal" for kind, *_ in blocks)


def elsewhere(lines, who):
    """The share of other questions answered correctly by the best chains ("right") or the full model ("full_right")."""
    asked = [line["reorder"] for line in lines if line["reorder"]]
    hits = sum(other[who] for other in asked)
    return share([True] * hits + [False] * (sum(other["asked"] for other in asked) - hits))


def split(lines):
    """The lines that the full model answers correctly, answers wrongly, and of the latter those corrected."""
    correct = [line for line in lines if line["initial_score"]]
    wrong = [line for line in lines if not line["initial_score"]]
    return correct, wrong, [line for line in wrong if line["best"] is not None]


def findings(lines):
    """{column: cell} of a study."""
    correct, wrong, _ = split(lines)
    pairs = [(line["best"] is not None, line["decoy"]["found"]) for line in wrong if line["decoy"]]
    return {
        "samples": str(len(lines)),
        "accuracy, full model": share([bool(line["initial_score"]) for line in lines]),
        "with CoLa": share([line["best"] is not None for line in lines]),
        "finding 1: correct with a shorter chain": share([len(line["best"]) < line["n_layers"] for line in correct]),
        "layers saved, %": mean([100 * (1 - len(line["best"]) / line["n_layers"]) for line in correct]),
        "finding 2: corrected": share([line["best"] is not None for line in wrong]),
        "decoys": share([decoy for _, decoy in pairs]),
        "lift": lift(pairs)}


def chains(lines):
    """{column: cell} of a study; "a / b" are of correct and of corrected samples."""
    correct, wrong, corrected = split(lines)

    def both(cell, value):
        return " / ".join(cell([value(line) for line in kind]) for kind in (correct, corrected))

    def promises(lines):
        return mean([line["promise"] for line in lines if line.get("promise") is not None])

    return {
        "depth": f"{both(mean, lambda line: len(line['best']))} of {lines[0]['n_layers']}",
        "skip": both(share, lambda line: not {*range(max(line["best"], default=0))} <= {*line["best"]}),
        "loop": both(share, lambda line: len(set(line["best"])) < len(line["best"])),
        "stop early": both(share, lambda line: line["n_layers"] - 1 not in line["best"]),
        "edits": both(mean, edits),
        "promise: corrected, still wrong": f"{promises(corrected)} / "
                                           f"{promises([line for line in wrong if line['best'] is None])}"}


def other_questions(lines):
    """{column: cell} of a study."""
    correct, _, corrected = split(lines)
    return {f"{name}: {who}": elsewhere(kind, field) for name, kind in (("correct", correct), ("corrected", corrected))
            for who, field in (("best chain", "right"), ("full model", "full_right"))}


def bare(answer):
    """The answer without its box: PoLar and Dr.LLM compare it with the content of the model's box."""
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
        graded = type(diff) is int and 1 <= diff <= 5
        name = f"dart-math-diff-{diff}" if graded else settings["dataset"].removesuffix(".jsonl")
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
    all_lines = [line for lines in studies.values() for line in lines]
    if args.levels:
        studies = {f"{title}, level {level}": [line for line in lines if str(line["level"]) == level]
                   for title, lines in studies.items() for level in sorted({str(line["level"]) for line in lines})}
    for table in (findings, chains, other_questions):
        columns = table(next(iter(studies.values())))
        print(f"| {table.__name__.replace('_', ' ')} | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
        for title, lines in studies.items():
            print(f"| {title} | {' | '.join(table(lines).values())} |")
        print()
    if args.polar:
        write_polar(args.polar, all_lines)
    if args.drllm:
        write_drllm(args.drllm, all_lines)


if __name__ == "__main__":
    cola.exit_on_error("report", main, parser().parse_args())
