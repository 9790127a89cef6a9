"""Searches one chain for a whole task on some of its samples, and tests it on others, which the search never sees.

    python -m scripts.fit --dataset arithmetic-5
    python -m scripts.fit --model org/name --dataset arc-easy --fit 0:64 --test 64:564 --export path/to/new

A chain's score is the share of the --fit samples that it answers correctly; its reward is that minus --depth-penalty
times the share of the full depth. A penalty of 0.05 says that half of the depth is worth 2.5 points of accuracy: near 0
the search looks for the most accurate chain, from 0.5 on for a shallow one. Samples run in parts of 16, in an order
drawn from --seed. After each part, the search gives up chains that have fallen behind the best one by more than two
standard deviations. Such a chain scores the share of the best minus what it lost to the best on the samples that both
have seen, so it never becomes the best itself. The table shows chains that have run on all samples: the full one, the
one of highest reward, and the next best of those that no other beats in both depth and score (the front). Intervals are
95 %, that of the difference paired by sample. The fitted chain was chosen without the test samples; choosing another by
their results would be fitting again.
"""
import math
import random
import time
from pathlib import Path

import cola
from tqdm import tqdm

import data
import mcts
from scripts import common
from scripts.export import export, new_folder, source

PART = 16  # samples between two checks for chains that have fallen behind
ROWS = 6  # chains of the front in the table, at most


def samples_of(model, tokenizer, problems, ids, cache_mb):
    """Yields a Sample for each id. Raises ValueError that names one that cannot run."""
    for i in ids:
        try:
            yield cola.Sample(model, tokenizer, problems[i], cache_mb)
        except ValueError as error:
            raise ValueError(f"sample {i}: {error}") from None


class Score:
    """A callable for `mcts.search`: a list of chains to the shares of samples that they answer correctly.

    Attributes:
      verdicts: {chain: list of bool, one for each sample that it ran on}.
      best: the chain of highest rank among those that have run on all samples.
    """

    def __init__(self, samples, n_layers, depth_penalty):
        self.samples, self.n_layers, self.depth_penalty = samples, n_layers, depth_penalty
        self.verdicts, self.best = {}, None

    def share(self, chain, seen=None):
        """Of the samples that a chain ran on, or the first `seen` of them, the share that it answers correctly."""
        return sum(self.verdicts[chain][:seen]) / len(self.verdicts[chain][:seen])

    def reward(self, chain, seen=None):
        """The reward for that share: `mcts.search`'s own, which a fork may replace."""
        return mcts.Result({chain: self.share(chain, seen)}, self.n_layers, self.depth_penalty).reward(chain)

    def rank(self, chain):
        """Ranks as `mcts.search` does: a chain that answers nothing is behind one that does, whatever the rewards."""
        return self.share(chain) > 0, self.reward(chain)

    def lost(self, chain):
        """How many more samples the best chain answers correctly, of those that this chain has seen."""
        return sum(self.verdicts[self.best][:len(self.verdicts[chain])]) - sum(self.verdicts[chain])

    def behind(self, chain):
        """Whether to give up a chain, given the samples that it and the best one have seen."""
        seen = len(self.verdicts[chain])
        differ = sum(ours != theirs for ours, theirs in zip(self.verdicts[self.best], self.verdicts[chain]))
        gap = self.reward(self.best, seen) - self.reward(chain)
        return self.share(self.best) > 0 and gap > 2 * math.sqrt(differ) / seen + 1e-9  # 1e-9: rounding

    def __call__(self, chains):
        self.verdicts |= {chain: [] for chain in chains}
        running, scores = chains, {}
        for i in range(0, len(self.samples), PART):
            for sample in self.samples[i:i + PART]:
                for chain, verdict in zip(running, sample.verify(running)):
                    self.verdicts[chain].append(verdict)
            for chain in [chain for chain in running if self.best is not None and self.behind(chain)]:
                # Not its own share, which depends on the samples seen as much as on the chain.
                estimate = self.share(self.best) - self.lost(chain) / len(self.verdicts[chain])
                scores[chain] = min(1, max(0, estimate))
            running = [chain for chain in running if chain not in scores]
        self.best = max(running + [self.best] * (self.best is not None), key=self.rank)
        return [scores.get(chain, self.share(chain)) for chain in chains]

    def front(self):
        """The chains, run on all samples, that no other beats in both depth and share; highest reward first."""
        whole = [chain for chain in self.verdicts if len(self.verdicts[chain]) == len(self.verdicts[self.best])]
        front, highest = [], -1
        for chain in sorted(whole, key=lambda chain: (len(chain), -self.share(chain))):
            if self.share(chain) > highest:
                front, highest = [*front, chain], self.share(chain)
        return sorted(front, key=self.rank, reverse=True)


def parser():
    p = common.parser("fit", __doc__)
    # Shares of few samples are noisy: a large batch lets the search look around before it follows a better chain.
    p.set_defaults(simulations=400, depth_penalty=0.05, batch=64)
    fit = p.add_argument_group("fit")
    fit.add_argument("--fit", default="0:64", metavar="FIRST:END", help="samples to search on (default: %(default)s)")
    fit.add_argument("--test", default="64:1064", metavar="FIRST:END", help="samples to test on (default: %(default)s)")
    fit.add_argument("--export", metavar="FOLDER", help="export the fitted chain as a checkpoint")
    return p


def main(args):
    problems = data.load(args.dataset, args.shots, args.split, args.boxed)
    fit = common.parse_samples(args.fit, len(problems), "--fit")
    test = common.parse_samples(args.test, len(problems), "--test")
    if {*fit} & {*test}:
        raise ValueError(f"--fit {args.fit} and --test {args.test} have samples in common; keep them apart")
    if args.export:
        new_folder(args.export, source(args.model, args.revision))
    model, tokenizer = cola.load_checkpoint(args)
    n_layers, full = len(model.layers), tuple(range(len(model.layers)))
    order = random.Random(args.seed).sample(fit, len(fit))  # an easy part says little about hard ones
    samples = [*samples_of(model, tokenizer, problems, order, args.cache_mb / len(order))]
    test_samples = [*samples_of(model, tokenizer, problems, test, 0)]  # each runs once, so there is nothing to keep
    score, start = Score(samples, n_layers, args.depth_penalty), time.perf_counter()
    with tqdm(total=args.simulations, desc="fit", unit="chain", disable=None, leave=False) as bar:
        def count(chains):
            shares = score(chains)
            bar.update(len(chains))
            return shares
        cola.search(args, count, n_layers, args.seed)
    seconds, front = time.perf_counter() - start, score.front()
    if not score.share(front[0]):
        raise ValueError(f"none of {len(score.verdicts)} chains answers any sample of --fit {args.fit} correctly; "
                         "choose other samples, more --simulations or another prompt")
    rows = [("full", full), ("fitted", front[0]), *(("front", chain) for chain in front[1:ROWS])]
    correct = {chain: [] for _, chain in rows}
    for sample in tqdm(test_samples, desc="test", unit="sample", disable=None, leave=False):
        for chain, verdict in zip(correct, sample.verify([*correct])):
            correct[chain].append(verdict)
    on_all = sum(len(verdicts) == len(fit) for verdicts in score.verdicts.values())
    print(f"{args.model}, {args.dataset}, {args.shots} shots, fit {args.fit}, test {args.test}, depth penalty "
          f"{args.depth_penalty}: {len(score.verdicts)} chains in {seconds:.0f} s, {on_all} of them on all samples\n")
    print("| chain | depth | correct, fit | correct, test | against the full chain |\n|---|---:|---:|---:|---:|")
    for label, chain in rows:
        gain = "-" if chain == full else common.lift([*zip(correct[chain], correct[full])])
        print(f"| {label} {cola.format_chain(chain)} | {len(chain)} | {score.share(chain):.1%} "
              f"| {common.share(correct[chain])} | {gain} |")
    if args.export:
        task, form = Path(args.dataset).name, "chat" if tokenizer.chat else "plain"
        export(args.model, cola.format_chain(front[0]), args.export, args.revision,
               f"It was fitted to the task {task} on samples {args.fit}, with {form} prompts of {args.shots} shots. "
               f"On {len(test)} other samples, {args.test}, it answers {common.share(correct[front[0]])} correctly, "
               f"the full chain {common.share(correct[full])} (exact match, with 95 % intervals).")


if __name__ == "__main__":
    cola.exit_on_error("fit", main, parser().parse_args())
