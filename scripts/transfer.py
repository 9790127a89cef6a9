"""How often the best chain of one sample answers other samples correctly: from one chain per sample to one per task.

    python -m scripts.transfer results/study_tiny.jsonl.gz
    python -m scripts.transfer runs/arc.jsonl --model path/to/checkpoint --dataset path/to/arc_easy.jsonl

A row is for the best chains of one level, a column for the samples of one level. A cell is the share in % of these
samples that such a chain answers correctly: the mean over the chains, with its 95 % interval, each chain's own sample
left out. The last row is the full model. Model, dataset, shots and prompt are those of the study, which records the
names of files without their folders: give --model, --dataset and --boxed again if they are elsewhere.
"""
import argparse
from pathlib import Path

import cola
from tqdm import tqdm

import data
from scripts import common
from scripts.fit import samples_of

CHAINS = 64  # that run as one batch


def parser():
    p = cola.Parser("python -m scripts.transfer", __doc__, usage="%(prog)s FILE [options]", conflict_handler="resolve")
    p.add_argument("file", type=Path, metavar="FILE", help="what scripts.study wrote, .jsonl or .jsonl.gz")
    p.add_argument("--dataset", metavar="NAME", help="as for the study (default: the study's)")
    p.add_argument("--boxed", metavar="FILE", help="as for the study (default: the study's)")
    cola.add_model_arguments(p)
    p.add_argument("--model", metavar="NAME", help="as for the study (default: the study's)")
    for name in ("--revision", "--no-chat"):  # always the study's
        p.add_argument(name, help=argparse.SUPPRESS)
    return p


def main(args):
    given = args.model, args.dataset
    for title, lines in common.studies([args.file]).items():
        settings = lines[0]["settings"]
        args.model, args.dataset = given[0] or settings["model"], given[1] or settings["dataset"]
        args.revision = None if Path(args.model).is_dir() else settings["revision"]  # a folder has none
        args.no_chat = not settings["chat"]
        model, tokenizer = cola.load_checkpoint(args)
        problems = data.load(args.dataset, settings["shots"], settings["split"],
                             args.boxed or settings.get("boxed"))
        for line in lines:
            if line["sample"] >= len(problems) or problems[line["sample"]].question != line["question"]:
                raise ValueError(f"{args.dataset} has no sample {line['sample']}, or asks another question there; give "
                                 "the study's own --dataset")
        found = [line for line in lines if line["best"] is not None]
        chains = [*{tuple(line["best"]): None for line in found} | {tuple(range(len(model.layers))): None}]
        correct = {chain: [] for chain in chains}  # {chain: verdict on the sample of each line}
        samples = samples_of(model, tokenizer, problems, [line["sample"] for line in lines], args.cache_mb)
        for sample in tqdm(samples, desc=title, total=len(lines), unit="sample", disable=None, leave=False):
            for i in range(0, len(chains), CHAINS):
                for chain, verdict in zip(chains[i:], sample.verify(chains[i:i + CHAINS])):
                    correct[chain].append(verdict)

        levels = sorted({str(line["level"]) for line in lines})
        print(f"{title}\n\n| chains | {' | '.join(f'level {level}' for level in levels)} |")
        print("|---|" + "---:|" * len(levels))
        for level in [*levels, "full"]:
            tried = [(line["sample"], correct[tuple(line["best"])]) for line in found if str(line["level"]) == level]
            if level == "full":
                tried = [(None, correct[tuple(range(len(model.layers)))])]
            cells = []
            for other in levels:
                asked = [[flag for line, flag in zip(lines, verdicts) if str(line["level"]) == other
                          and line["sample"] != sample] for sample, verdicts in tried]
                shares = [100 * sum(flags) / len(flags) for flags in asked if flags]
                cells.append(common.mean(shares) if len(shares) > 1 else f"{shares[0]:.1f}" if shares else "-")
            label = "full model" if level == "full" else f"of level {level}, {len(tried)} chains"
            print(f"| {label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    cola.exit_on_error("transfer", main, parser().parse_args())
