"""Compares searches on the same samples, with the same budget of distinct chains at most and the same verifier.

    python -m scripts.compare_search
    python -m scripts.compare_search --table ablation
    python -m scripts.compare_search --model path/to/checkpoint --dataset arithmetic-1 --shots 2 --samples 0:30

Tables: `searches` sets mcts.search beside the four of search_baselines.py and its own random control; `ablation` takes
one idea after the other out of it; `special` narrows the window of actions to earlier methods. *Depth* is that of the
shortest right chain, its mean over the samples that the full model gets right; *fixed* is the share of the samples it
gets wrong for which a right chain was found. Intervals are of 95 % over samples: normal for a mean, Wilson for a share;
*against the first* is the mean difference in depth, paired by sample. Smaller budgets are read off the same runs, and
*chains/s* is that of the largest. A sample's seed is its place among --samples plus --seed.
"""
import time
from contextlib import nullcontext
from unittest.mock import patch

import cola  # before torch, as it silences a warning
from tqdm import tqdm

import data
import mcts
from scripts import common, search_baselines
from scripts.common import mean, share


def keeping(*names):
    """Search.update, after which these attributes are as before."""
    update = mcts.Search.update

    def update_and_keep(self, pending, scores):
        kept = {name: getattr(self, name) for name in names}
        update(self, pending, scores)
        vars(self).update(kept)
    return patch.object(mcts.Search, "update", update_and_keep)


def tables(args):
    """{label: (search, what to patch while it runs)}; a search is a function (score, n_layers, budget, seed)."""
    def uct(**options):
        options = {"depth_penalty": args.depth_penalty, "exploration": args.exploration, "max_skip": args.max_skip,
                   "max_loop": args.max_loop, "batch": args.batch} | options
        return lambda score, n, budget, seed: mcts.search(score, n, budget, seed, **options).evaluated
    ours, constants = uct(), lambda **values: patch.multiple(mcts, **values)
    return {
        "searches": {
            "mcts.search": (ours, None),
            "the same, batch 1": (uct(batch=1), None),
            "its control, `--search random`": (uct(learn=False), None),
            **{name: (getattr(search_baselines, name), None)
               for name in ("hill_climb", "edit_mcts", "random_chains", "leaf_mcts")}},
        "ablation": {
            "mcts.search": (ours, None),
            "no tree, rollouts alone": (ours, constants(MATURE=10 ** 4)),
            "nodes expand at the first visit": (ours, constants(MATURE=1)),
            "the tree is kept when the best chain changes": (ours, keeping("root")),
            "a rollout is drawn once, known chain or not": (ours, constants(TRIES=1)),
            "no wider rollouts where no new chain is found": (ours, constants(WIDEN=1)),
            "no bound on depth": (ours, keeping("limit")),
            "policy follows the full-depth chain (so no bound)": (ours, keeping("best", "ends", "root", "limit")),
            "skips of at most 4 layers": (uct(max_skip=4), None),
            "no more loops while nothing is right": (ours, constants(EARLY_LOOP=mcts.LOOP)),
            "exploration 2": (uct(exploration=2), None),
            "exploration 32": (uct(exploration=32), None)},
        "special": {
            "the default window: any skip, loops of up to 4": (uct(max_skip=None, max_loop=4), None),
            "`--max-loop 0`: skip only (layer pruning)": (uct(max_skip=None, max_loop=0), None),
            "`--max-skip 0`: loop only (looped blocks)": (uct(max_skip=0, max_loop=4), None),
            "both 0: stop only (early exit)": (uct(max_skip=0, max_loop=0), None),
            "`--max-loop` of the model's depth: any order": (uct(max_skip=None, max_loop=10 ** 6), None)},
    }[args.table]


def parser():
    p = common.parser("compare_search", __doc__)
    table = p.add_argument_group("table")
    table.add_argument("--table", choices=["searches", "ablation", "special"], default="searches", metavar="NAME",
                       help="searches, ablation or special (default: %(default)s)")
    table.add_argument("--only", nargs="+", metavar="ROW", help="rows of the table to make, by their names in it")
    table.add_argument("--samples", default="0:250", metavar="FIRST:END",
                       help="samples to search (default: %(default)s)")
    table.add_argument("--simulations", type=cola.at_least(1), nargs="+", default=[50, 200], metavar="N",
                       help="distinct chains a sample, one or several budgets (default: 50 200)")
    return p


def shortest(evaluated, budget):
    """Depth of the shortest right chain among the first `budget` chains; None if there is none."""
    return min((len(chain) for chain, score in list(evaluated.items())[:budget] if score), default=None)


def main(args):
    model, tokenizer = cola.load_checkpoint(args)
    problems = data.load(args.dataset, args.shots, args.split)
    samples = common.parse_samples(args.samples, len(problems))
    problems, full = problems[samples.start:samples.stop], tuple(range(len(model.layers)))
    searches = {label: row for label, row in tables(args).items() if not args.only or label in args.only}
    if len(searches) < len(args.only or searches):
        raise ValueError(f"--only names a row that is not there; {args.table!r} has {', '.join(tables(args))}")
    budget = max(args.simulations)
    runs, speed = {}, {}
    with tqdm(total=len(searches) * len(problems), unit="sample") as bar:
        for label, (search, change) in searches.items():
            bar.set_description(label)
            runs[label], start = [], time.perf_counter()
            with change or nullcontext():
                for i, problem in enumerate(problems):
                    verify = cola.Sample(model, tokenizer, problem, args.cache_mb).verify
                    runs[label].append(search(verify, len(full), budget, args.seed + i))
                    bar.update()
            speed[label] = sum(map(len, runs[label])) / (time.perf_counter() - start)

    right = [run[full] for run in runs[next(iter(runs))]]
    print(f"{args.model}, {args.dataset}, {args.shots} shots, samples {args.samples}: the full model of {len(full)} "
          f"layers gets {sum(right)} right and {len(right) - sum(right)} wrong\n")
    print("| search | chains | depth, right samples | against the first | shorter | fixed, wrong samples | chains/s |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for chains in args.simulations:
        reference = None
        for label in runs:
            depths = [shortest(run, chains) for run in runs[label]]
            of_right = [depth for depth, ok in zip(depths, right) if ok]
            reference = reference or of_right
            of_wrong = [depth is not None for depth, ok in zip(depths, right) if not ok]
            cells = [label, str(chains), mean(of_right), mean([a - b for a, b in zip(of_right, reference)]),
                     share([depth < len(full) for depth in of_right]), share(of_wrong), f"{speed[label]:.0f}"]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    cola.exit_on_error("compare_search", main, parser().parse_args())
