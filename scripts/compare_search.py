"""Compares searches on the same samples, with the same budget of distinct chains and the same verifier.

    python -m scripts.compare_search
    python -m scripts.compare_search --table ablation
    python -m scripts.compare_search --model path/to/checkpoint --no-chat --dataset tasks/capitals.jsonl --shots 5

Tables: `searches` sets mcts.search beside the searches of search_baselines.py and follow_best.py; `ablation` takes one
idea after the other out of it; `special` narrows the window of actions to earlier methods. The columns:
  depth: of the shortest correct chain, its mean over the samples that the full model answers correctly.
  corrected: of the samples that it gets wrong, those for which it finds a correct chain.
  decoys: of the same samples, those for which the same search, with the same guidance, reached a wrong answer.
  lift: corrected less decoys, over the wrong samples that have a decoy.
"against the first" is the mean difference to the first row, paired by sample and seed. Intervals are of 95 % over
samples: normal for a mean, Wilson for a share, Newcombe for the lift. Smaller budgets are read off the same runs.
Sample i is searched --seeds times, with the seeds --seed + i, --seed + 1000 + i, ...
"""
import argparse
import random
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import cola
from tqdm import tqdm

import data
import mcts
from model import Verifier
from scripts import common, search_baselines
from scripts.common import lift, mean, share
from scripts.follow_best import follow_best
from scripts.study import decoy_answer


def tables(args):
    """{label: (search, what to patch while it runs)}; a search is a function (verifier, n_layers, budget, seed)."""
    def ours(estimate=Verifier.departures, **options):
        options = {"depth_penalty": args.depth_penalty, "exploration": args.exploration, "max_skip": args.max_skip,
                   "max_loop": args.max_loop, "batch": args.batch} | options
        return lambda verify, n, budget, seed: mcts.search(
            verify.score, n, budget, seed, departures=estimate and estimate(verify), **options).evaluated

    def baseline(search):
        return lambda verify, *rest: search(verify.score, *rest)
    blind, constants = partial(ours, None, promise=False), partial(patch.multiple, mcts)
    return {
        "searches": {
            "mcts.search": (ours(), None),
            "follow_best": (baseline(follow_best), None),
            **{name: (baseline(getattr(search_baselines, name)), None)
               for name in ("guided_search", "hill_climb", "edit_mcts", "released_mcts", "random_chains")}},
        "ablation": {
            "mcts.search": (ours(), None),
            "no tree": (ours(), constants(MATURE=10 ** 4)),
            "no promise (`--search blind`)": (blind(), None),
            "no tree, no promise": (blind(), constants(MATURE=10 ** 4)),
            "no elite: the policy around the full chain": (ours(), constants(ELITE=0)),
            "no elite, no tree (`--search random`)": (ours(None, learn=False), None),
            "departures by the distance of layers": (ours(None), None),
            "departures scaled once, to the full chain": (ours(), patch.object(
                mcts.Search, "rate", property(lambda self: sum(self.row_sums), lambda *_: None), create=True)),
            "departures without the gradient": (ours(partial(Verifier.departures, gradient=0)), None),
            "departures without the distance of states": (ours(partial(Verifier.departures, distance=0)), None),
            "an elite of 1 chain": (ours(), constants(ELITE=1)),
            "an elite of 64 chains": (ours(), constants(ELITE=64)),
            "all elite chains count the same": (ours(), constants(SHARPNESS=0)),
            "nodes expand at the first visit": (ours(), constants(MATURE=1)),
            "nodes expand after 32 visits": (ours(), constants(MATURE=32)),
            "a rollout is drawn once, known or not": (ours(), constants(TRIES=1)),
            "skips of at most 4 layers": (ours(max_skip=4), None),
            "batch 1": (ours(batch=1), None),
            "batch 32": (ours(batch=32), None),
            "exploration 0.1": (ours(exploration=0.1), None),
            "exploration 8": (ours(exploration=8), None)},
        "special": {
            "the default window: any skip, loops of up to 4": (ours(max_skip=None, max_loop=4), None),
            "`--max-loop 0`: skip only (layer pruning)": (ours(max_skip=None, max_loop=0), None),
            "`--max-skip 0`: loop only (looped blocks)": (ours(max_skip=0, max_loop=4), None),
            "both 0: stop only (early exit)": (ours(max_skip=0, max_loop=0), None),
            "`--max-loop` of the model's depth: any order": (ours(max_skip=None, max_loop=10 ** 6), None)},
    }[args.table]


def parser():
    p = common.parser("compare_search", __doc__)
    p.add_argument("--search", help=argparse.SUPPRESS)  # the rows of the table say which search
    table = p.add_argument_group("table")
    table.add_argument("--table", choices=["searches", "ablation", "special"], default="searches", metavar="NAME",
                       help="searches, ablation or special (default: %(default)s)")
    table.add_argument("--only", nargs="+", metavar="ROW", help="rows of the table to make, by their names in it")
    table.add_argument("--samples", metavar="FIRST:END",
                       help="samples to search (default: the first 250)")
    table.add_argument("--simulations", type=cola.at_least(1), nargs="+", default=[50, 200], metavar="N",
                       help="distinct chains a sample, one or several budgets (default: 50 200)")
    table.add_argument("--seeds", type=cola.at_least(1), default=1, metavar="N",
                       help="searches of each sample (default: %(default)s)")
    table.add_argument("--no-decoy", action="store_true", help="leave the decoys out")
    return p


def shortest(evaluated, budget):
    """Depth of the shortest correct chain among the first `budget` chains; None if there is none."""
    return min((len(chain) for chain, correct in list(evaluated.items())[:budget] if correct), default=None)


def decoy_of(tokenizer, problem, problems, prediction, seed):
    """The problem with a wrong answer in place of the correct one, or None."""
    wrong = decoy_answer(tokenizer, problem, problems, prediction, random.Random(seed))
    return None if wrong is None else replace(problem, answer=wrong)


def main(args):
    problems = data.load(args.dataset, args.shots, args.split, args.boxed)
    samples = common.parse_samples(args.samples, len(problems))
    model, tokenizer = cola.load_checkpoint(args)
    full = tuple(range(len(model.layers)))
    searches = {label: row for label, row in tables(args).items() if not args.only or label in args.only}
    if len(searches) < len(args.only or searches):
        raise ValueError(f"--only names an unknown row; {args.table!r} has {', '.join(tables(args))}")
    answers = [cola.Sample(model, tokenizer, problems[i], 0).answer(full) for i in samples]
    correct = [ok for _, ok in answers]
    decoys = [None if ok or args.no_decoy else decoy_of(tokenizer, problems[i], problems, text, args.seed + i)
              for i, (text, ok) in zip(samples, answers)]
    depths, reached, speed = {}, {}, {}  # {(label, budget): a depth or None for each sample and seed}
    total = len(searches) * args.seeds * (len(samples) + sum(map(bool, decoys)))
    with tqdm(total=total, unit="search", disable=None) as bar:
        for label, (search, change) in searches.items():
            bar.set_description(label)
            chains, start = 0, time.perf_counter()
            with change or nullcontext():
                for seed in range(args.seed, args.seed + 1000 * args.seeds, 1000):
                    for i, decoy in zip(samples, decoys):
                        for table, problem in ((depths, problems[i]), (reached, decoy)):
                            run = {}
                            if problem is not None:
                                sample = cola.Sample(model, tokenizer, problem, args.cache_mb)
                                run = search(sample.verify, len(full), max(args.simulations), seed + i)
                                chains += len(run)
                                bar.update()
                            for budget in args.simulations:
                                table.setdefault((label, budget), []).append(shortest(run, budget))
            speed[label] = chains / (time.perf_counter() - start)

    correct, decoys = correct * args.seeds, decoys * args.seeds
    print(f"{args.model}, {args.dataset}, {args.shots} shots, samples {samples.start}:{samples.stop}, "
          f"seeds: {args.seeds}, {str(model.lm_head.weight.dtype).removeprefix('torch.')}: of {len(samples)} samples "
          f"the full model of {len(full)} layers answers {sum(correct) // args.seeds} correctly\n")
    print("| search | chains | depth | against the first | corrected | decoys | lift | chains/s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for budget in args.simulations:
        reference = None
        for label in searches:
            # Plain generation says whether the full model is correct; if the verifier differs, the full depth counts.
            of_correct = [len(full) if depth is None else depth
                          for depth, ok in zip(depths[label, budget], correct) if ok]
            reference = reference or of_correct
            found = [depth is not None for depth in depths[label, budget]]
            pairs = [(hit, other is not None) for hit, other, decoy, ok in
                     zip(found, reached[label, budget], decoys, correct) if decoy and not ok]
            cells = [label, str(budget), mean(of_correct), mean([a - b for a, b in zip(of_correct, reference)]),
                     share([hit for hit, ok in zip(found, correct) if not ok]), share([other for _, other in pairs]),
                     lift(pairs), f"{speed[label]:.0f}"]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    cola.exit_on_error("compare_search", main, parser().parse_args())
