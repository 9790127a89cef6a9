"""Monte Carlo Tree Search for a chain of layers: UCT with priors over "append a layer" and "stop".

A node of the tree is a prefix of a chain. After a prefix whose last layer is l, the actions are to append a layer from
l + 1 - max_loop (below l + 1: a loop) to l + 1 + max_skip (above: a skip), or to stop, which completes the chain.

The policy provides the tree's priors and the rollouts. After a layer it does what chains of the elite, the most
valuable short ones so far, do next; about once per chain it departs from that, as the weights `departures` say.

References: [1] UCT, Kocsis & Szepesvari 2006. [2] PUCT (UCT with priors), Silver et al. 2016 (AlphaGo).
CoLa, arXiv 2507.07996, section 3: its search edits whole chains by blocks; ours builds them layer by layer.
"""
import math
import random
from bisect import bisect
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, pairwise

ELITE = 16  # chains in the elite; results/search_ablation.md shows what this and the other constants are worth
SHARPNESS = 3  # each transition of an elite chain is weighted by the chain's worth to this power
MATURE = 8  # visits before a node selects among its children: the mean of fewer values says little
TRIES = 10  # rollouts from a node until one gives a new chain
MISSES = 10000  # walks without a new chain before a batch is scored as it is or, if empty, the search moves on


@dataclass
class Result:
    """What a search found."""
    evaluated: dict  # {chain: score} in order of evaluation, the full-depth chain first
    n_layers: int  # of the model
    depth_penalty: float  # as given to `search`
    promises: dict = field(default_factory=dict)  # {chain: promise}, for scores that come with one

    def reward(self, chain):
        """Score - depth_penalty * depth / n_layers."""
        return self.evaluated[chain] - self.depth_penalty * len(chain) / self.n_layers

    def correct(self):
        """The chains with a score above 0, highest reward first; ties: shorter first, then earlier."""
        correct = [chain for chain, score in self.evaluated.items() if score > 0]
        return sorted(correct, key=lambda chain: (-self.reward(chain), len(chain)))

    @property
    def best(self):
        """The first of `correct()` (for a bool score: the shortest correct chain), or None."""
        return next(iter(self.correct()), None)


class Node:
    """A prefix of a chain or, after the action stop, a complete chain; closed: it leads to no new chain."""

    def __init__(self):
        self.children, self.visits, self.total, self.closed = defaultdict(Node), 0, 0.0, False  # total: of the values

    def bound(self, width):
        """The upper confidence bound of PUCT [2], Q + c * P * sqrt(N) / (1 + n); `width` is c * P * sqrt(N)."""
        return self.total / self.visits + width / (1 + self.visits)  # Q: mean value, n: visits, N: the parent's

    def select(self, priors, actions, exploration):
        """The action with the highest bound, or None if all are closed. The most likely of `actions` comes first."""
        scale, best, highest = exploration * math.sqrt(self.visits), None, -math.inf
        for action in actions:
            if action not in self.children:  # n is 0, and Q its parent's mean (first-play urgency)
                best, highest = action, self.total / self.visits + scale * priors[action]
                break  # other untried actions have lower priors
        for action, child in self.children.items():
            if not child.closed:
                bound = child.bound(scale * priors[action])
                if best is None or bound > highest:
                    best, highest = action, bound
        return best


class Search:
    """The tree, the policy and the result of one search; arguments as for `search`. An action is a layer or `stop`.

    Attributes:
      worth: {chain: its score or, if 0, exp(promise)}, the geometric mean of the answer's token probabilities.
      value: {chain: what it backs up}, its reward with its worth in place of the score.
      limit: the greatest depth to try: 2 * n_layers, or the last where a score of 1 beats `highest`, the best reward.
      elite: the ELITE chains of highest value, correct or wrong, no deeper than a correct best chain: limit + 1.
      table: {layer: {action: weight}}, the transitions of the elite or, while it is worth 0, of the full-depth chain.
      departures, row_sums: the weights; for each action, their sum over the actions that may replace it.
      rate: the sum of row_sums along a chain, mean over the elite; divided by it, a walk departs about once.
    """

    def __init__(self, n_layers, seed, depth_penalty, exploration, max_skip, max_loop, allowed, departures, learn,
                 promise):
        self.n_layers, self.exploration, self.max_skip, self.max_loop = n_layers, exploration, max_skip, max_loop
        self.learn, self.use_promise, self.rng, self.allowed = learn, promise, random.Random(seed), allowed
        self.stop = n_layers  # as if it were the layer after the last, so it is likelier near the end
        self.result, self.root, self.value, self.worth = Result({}, n_layers, depth_penalty), Node(), {}, {}
        actions, even = range(n_layers + 1), departures is None
        if even:
            departures = [[(1 if i < j else 0.5) / max(1, abs(i - j)) for j in actions] for i in actions]
        elif {len(departures), *map(len, departures)} != {n_layers + 1}:
            raise ValueError(f"departures must be a table of n_layers + 1 = {n_layers + 1} rows and columns")
        if any(i not in (*self.window(i - 1), self.stop) for i in actions):
            raise ValueError("the layers that may follow a layer must include the next one")
        departures = [[0 if i == j else departures[i][j] for j in actions] for i in actions]
        row_sums = [sum(departures[i][j] for j in (*self.window(i - 1), self.stop)) for i in actions]
        scales = [1 / (row_sum or 1) if even else 1 for row_sum in row_sums]
        self.departures = [[scale * weight for weight in row] for scale, row in zip(scales, departures)]
        self.row_sums = [scale * row_sum for scale, row_sum in zip(scales, row_sums)]
        self.highest, self.limit, self.elite, self.table = -math.inf, 2 * n_layers, [], {}
        self.policy = cache(self.policy_after)

    def window(self, last):
        """The layers that may be appended after the layer `last` (-1 at the beginning); last + 1 is among them."""
        return range(max(0, last + 1 - self.max_loop), min(self.n_layers, last + 2 + self.max_skip))

    def record(self, chain, score):
        """Adds a chain with its score, a number or a pair with its promise; a new best chain lowers the limit."""
        score, promise = score if isinstance(score, (tuple, list)) and len(score) == 2 else (score, None)
        if not (isinstance(score, (int, float)) and 0 <= score <= 1  # false for NaN
                and (promise is None or isinstance(promise, (int, float)) and promise <= 0)):
            raise ValueError(f"the score of chain {list(chain)} is {score!r}, its promise {promise!r}; return a Python "
                             "number in [0, 1], or a pair of one and a promise of at most 0")
        self.result.evaluated[chain] = score
        if promise is not None and self.use_promise:
            self.result.promises[chain] = promise
        reward = self.result.reward(chain)
        self.worth[chain] = score or math.exp(self.result.promises.get(chain, -math.inf))
        self.value[chain] = reward - score + self.worth[chain]
        if self.learn and self.result.depth_penalty and score > 0 and reward > self.highest:
            self.highest = reward
            depth = (1 - reward) * self.n_layers / self.result.depth_penalty  # at which a full score has this reward
            self.limit = math.ceil(min(2 * self.n_layers + 1, depth - 1e-6)) - 1  # branch and bound; 1e-6: rounding

    def update_policy(self, chains):
        """Updates the elite with these chains and, if it changed, `table` and `rate`."""
        shallow = [chain for chain in [*self.elite, *chains] if len(chain) <= self.limit + 1]
        elite = sorted(shallow, key=self.value.get, reverse=True)[:ELITE] if self.learn else []
        if elite != self.elite or not self.table:
            self.elite, self.table = elite, defaultdict(lambda: defaultdict(float))
            self.policy.cache_clear()
            weights = {chain: weight for chain in elite if (weight := self.worth[chain] ** SHARPNESS)}
            for chain, weight in (weights or {tuple(range(self.n_layers)): 1}).items():
                for last, action in pairwise((-1, *chain, self.stop)):
                    self.table[last][action] += weight
            total = sum(weight * self.row_sums[action] for row in self.table.values() for action, weight in row.items())
            self.rate = total / sum(self.table[-1].values()) or 1  # 0 for an elite that can only stop

    def policy_after(self, last):
        """After a layer (-1: none): priors by action; possible actions, most likely first; their cumulative priors."""
        row = self.table.get(last, {last + 1: 1})  # after a layer that no elite chain has, the next one
        actions, priors, total = [*self.window(last), self.stop], [0] * (self.n_layers + 1), sum(row.values())
        for usual, weight in row.items():
            departures, share = self.departures[usual], weight / total
            departure = sum([departures[action] for action in actions]) / self.rate  # its probability; capped below
            scale = share / (self.rate * max(1, 2 * departure))
            priors = [prior + scale * weight for prior, weight in zip(priors, departures)]
            priors[usual] += share * max(0.5, 1 - departure)
        actions.sort(key=priors.__getitem__, reverse=True)
        return priors, actions, [*accumulate(map(priors.__getitem__, actions[:-1]))]  # the last would be 1

    def select_and_expand(self):
        """Walks down to a node of fewer than MATURE visits, maybe a new one; returns the nodes and [-1, *actions]."""
        node, path, actions = self.root, [self.root], [-1]
        while self.learn and node.visits >= MATURE and not node.closed:
            priors, likely, _ = self.policy(actions[-1])
            action = node.select(priors, likely, self.exploration)
            if action is None:  # nothing new is below
                node.closed = True
                break
            node = node.children[action]  # for an untried action a new Node: the expansion
            path.append(node)
            actions.append(action)
            node.closed = action == self.stop or len(actions) > self.limit
        for node in path:
            node.visits += 1  # before the value is known: until then it counts as 0, so that a batch spreads out
        if node.closed and actions[-1] != self.stop:
            actions.append(self.stop)  # at the limit a chain can only stop; elsewhere this one is known: a miss
        return path, actions

    def roll_out(self, start, pending):
        """Completes actions with the policy to a chain that is new, allowed and within the limit; None after TRIES."""
        policy, draw, stop = self.policy, self.rng.random, self.stop
        for _ in range(TRIES if start[-1] != stop else 1):  # a complete chain stays as it is
            actions, action = [*start], start[-1]
            while action != stop and len(actions) <= self.limit + 1:
                _, choices, cumulative = policy(action)
                action = choices[bisect(cumulative, draw())]
                actions.append(action)
            chain = tuple(actions[1:-1])
            if (action == stop and len(chain) <= self.limit and chain not in self.value
                    and chain not in pending and self.allowed(chain)):
                return chain

    def back_up(self, path, value):
        for node in path:
            node.total += value


def search(score, n_layers, simulations=200, seed=0, depth_penalty=0.2, exploration=0.5, max_skip=None, max_loop=4,
           allowed=None, departures=None, batch=8, learn=True, promise=True):
    """Searches for a chain of high reward, at most 2 * n_layers deep; returns a Result.

    Args:
      score: callable, a list of chains (tuples of layer indices) to a list of numbers in [0, 1] (a bool is one), or of
        pairs of such a number and a promise, the mean log-probability of the correct answer's tokens.
      simulations: distinct chains to evaluate, the full-depth chain first; fewer if no more are found.
      seed: the same seed, batch, scores and departures give the same result.
      depth_penalty: what the full depth costs in the reward, where a correct answer is worth 1.
      exploration: the constant c of the upper confidence bound; the larger, the less the values of nodes count.
      max_skip, max_loop: layers that a step may skip (None: any number) and go back (1 repeats the last layer).
      allowed: callable that says of a complete chain whether it may be evaluated (None: all may; the full-depth chain
        always is). If it allows few chains (about one in 10,000), the search may end before it finds them.
      departures: [i][j] weighs action j where an elite chain takes i (n_layers: stop), as `Verifier.departures` does;
        only ratios matter. None: every i is departed from equally often, in proportion to 1 / |i - j|, half if j < i.
      batch: chains to score at a time.
      learn, promise: False for the controls random (no tree, no elite) and blind (no promises) of cola.py's `--search`.
    Raises ValueError for malformed scores, departures or windows, and a wrong number of scores; checks nothing else.
    """
    state = Search(n_layers, seed, depth_penalty, exploration, n_layers if max_skip is None else max_skip, max_loop,
                   allowed or (lambda chain: True), departures, learn, promise)
    pending = {tuple(range(n_layers)): []}  # {chain: the nodes on the way to it}; the first one is not in the tree
    while pending:  # score a batch and back it up, then collect the next one
        scores = list(score([*pending]))
        if len(scores) != len(pending):
            raise ValueError(f"{len(scores)} scores for {len(pending)} chains from {list(next(iter(pending)))} on; "
                             "return one for each")
        for (chain, path), chain_score in zip(pending.items(), scores):
            state.record(chain, chain_score)
            state.back_up(path, state.value[chain])
        state.update_policy(pending)
        pending, misses = {}, 0
        while len(pending) < min(batch, simulations - len(state.value)):
            if state.root.closed or misses >= MISSES:  # no new chain is left within the limit, or none is found
                if pending or state.limit == 2 * n_layers:
                    break
                state.root, state.limit, misses = Node(), 2 * n_layers, 0  # nothing better is left: on to deeper chains
            path, actions = state.select_and_expand()
            chain = state.roll_out(actions, pending)
            if chain is not None:
                pending[chain] = path
            else:
                misses += 1
                state.back_up(path, -depth_penalty * state.limit / n_layers)  # like a wrong chain at the limit
    return state.result
