"""Monte Carlo Tree Search for a chain of layers: UCT over "append a layer" and "stop".

A node of the tree is a prefix of a chain. After a prefix whose last layer is l, the actions are to append a layer from
l + 1 - max_loop to l + 1 + max_skip, or to stop, which completes the chain. Appending l + 1 goes on to the next layer,
a lower one loops, a higher one skips; stopping before the last layer is an early exit. One simulation
  1. selects: walks down the tree by upper confidence bounds [1] with priors [2], to a node of fewer than MATURE visits,
  2. expands: adds that node if it is new,
  3. rolls out: completes the chain from there with the policy, which also gives the priors,
  4. backs up: adds the chain's value to every node on the way.
The policy is a table of transitions, counted in the elite, the most valuable chains so far: after a layer it does what
elite chains do there, and now and then something close to it. So it recombines good chains and edits them at once.
A score may be a pair (correct, promise) that tells how near a wrong chain came. Then a wrong chain, whose reward is
that of a failure, is worth exp(promise) to the search: the geometric mean of the probabilities of the answer's tokens.

References: [1] UCT, Kocsis & Szepesvari 2006. [2] PUCT, Silver et al. 2016.
CoLa, arXiv 2507.07996, section 3: its search edits whole chains by blocks; ours builds them layer by layer.
"""
import math
import random
from bisect import bisect
from dataclasses import dataclass, field
from heapq import nlargest
from itertools import accumulate, pairwise
from numbers import Real

ELITE = 16  # chains in the elite
SHARPNESS = 3  # a transition counts with the worth of its chain to this power
DEPARTURES = 1.0  # how often the policy leaves the elite's transitions, in n_layers steps
LOOP, EARLY_LOOP = 0.25, 0.45  # the share of departures that loop, once a chain is correct and before
TRIES = 10  # rollouts from a node, until one gives a new chain
MATURE = 8  # visits from which a node chooses among its children: the mean of fewer values says little


@dataclass
class Result:
    """What a search found.

    Attributes:
      evaluated: {chain: score} in order of evaluation, the full-depth chain first; of a pair the first member.
      n_layers, depth_penalty: as given to `search`.
      promises: {chain: promise}, where scores are pairs.
    """
    evaluated: dict
    n_layers: int
    depth_penalty: float
    promises: dict = field(default_factory=dict)

    def reward(self, chain):
        """Score - depth_penalty * depth / n_layers."""
        return self.evaluated[chain] - self.depth_penalty * len(chain) / self.n_layers

    def right(self):
        """The chains with score > 0 by reward, highest first; ties: shorter first, then earlier."""
        right = [chain for chain, score in self.evaluated.items() if score > 0]
        return sorted(right, key=lambda chain: (-self.reward(chain), len(chain)))

    @property
    def best(self):
        """The first of `right()` (for a bool score: the shortest correct chain), or None."""
        return next(iter(self.right()), None)


class Node:
    """A prefix of a chain, or, below the action stop, a complete chain.

    Attributes:
      children: {action: Node}, those visited so far.
      visits, value: number of simulations that came through, and the sum of their values.
      closed: there is nothing left to evaluate below.
    """
    __slots__ = ("children", "visits", "value", "closed")

    def __init__(self):
        self.children, self.visits, self.value, self.closed = {}, 0, 0.0, False

    def bound(self, action, prior, width):
        """The upper confidence bound of an action: Q + prior * width / (1 + visits of the child).

        Q is the mean value of the simulations that took the action; if none did, of all that came here. width is the
        exploration constant times the square root of the visits of this node.
        """
        if (child := self.children.get(action)) is None:
            return self.value / self.visits + prior * width
        return -math.inf if child.closed else child.value / child.visits + prior * width / (1 + child.visits)


class Search:
    """The tree and the policy of one search; arguments as for `search`. An action is a layer to append, or `stop`.

    Attributes:
      best: the correct chain of highest reward so far, or None.
      limit: the depth beyond which not even a full score would make a chain the best (branch and bound); 2 * n_layers
        again once no other chains are left.
      elite: the ELITE chains of highest value, none deeper than the best.
      table: {layer: {action: weight}}, what the elite does after each layer; -1 stands for the beginning.
    """

    def __init__(self, n_layers, seed, depth_penalty, exploration, max_skip, max_loop, learn, promise):
        self.n_layers, self.exploration, self.max_skip, self.max_loop = n_layers, exploration, max_skip, max_loop
        self.learn, self.promise, self.rng = learn, promise, random.Random(seed)
        self.stop = n_layers  # as if it were one layer more: in the full-depth chain it follows the last one
        self.result, self.root, self.limit = Result({}, n_layers, depth_penalty), Node(), 2 * n_layers
        self.best, self.elite, self.near, self.departure = None, [], {}, min(0.5, DEPARTURES / n_layers)
        self.count({tuple(range(n_layers)): 1})

    def window(self, last):
        """The layers that may be appended after the layer `last` (-1 before the first)."""
        return range(max(0, last + 1 - self.max_loop), min(self.n_layers, last + 2 + self.max_skip))

    def worth(self, chain):
        """The score; exp(promise) if the chain is wrong."""
        return self.result.evaluated[chain] or math.exp(self.result.promises.get(chain, -math.inf))

    def value(self, chain):
        """What a chain backs up: its reward, with its worth in place of the score."""
        return self.result.reward(chain) - self.result.evaluated[chain] + self.worth(chain)

    def take(self, chains, scores):
        """Records the scores of chains and learns from them."""
        evaluated, reward = self.result.evaluated, self.result.reward
        for chain, score in zip(chains, scores):
            evaluated[chain], promise = split(chain, score)
            if promise is not None and self.promise:
                self.result.promises[chain] = promise
        if not self.learn:
            return
        known = self.best, self.elite
        for chain in chains:
            if evaluated[chain] > 0 and (self.best is None or reward(chain) > reward(self.best)):
                self.best = chain
                if self.result.depth_penalty:  # less than the depth at which a full score has the reward of the best
                    depth = (1 - reward(chain)) * self.n_layers / self.result.depth_penalty
                    self.limit = min(2 * self.n_layers, math.ceil(depth - 1e-6) - 1)
        shallow = [chain for chain in [*self.elite, *chains] if len(chain) <= self.limit + 1]
        self.elite = nlargest(ELITE, shallow, key=self.value)
        if (self.best, self.elite) != known:
            worths = {chain: self.worth(chain) for chain in self.elite if self.worth(chain) > 0}
            if worths:  # else all scores are 0, without promises: the policy stays around the full-depth chain
                self.count(worths)

    def count(self, worths):
        """Makes the table of transitions from {chain: worth}."""
        self.table, self.known_priors, self.known_draws = {}, {}, {}
        for chain, worth in worths.items():
            for last, action in pairwise((-1, *chain, self.stop)):
                row = self.table.setdefault(last, {})
                row[action] = row.get(action, 0) + worth ** SHARPNESS

    def around(self, last, usual):
        """{action: probability} once the policy departs from the usual action after a layer: close ones are likely."""
        loop = EARLY_LOOP if self.best is None else LOOP
        if (last, usual, loop) not in self.near:
            back = {action: 1 / (usual - action) for action in self.window(last) if action < usual}
            ahead = {action: 1 / (action - usual) for action in [*self.window(last), self.stop] if action > usual}
            share = loop if back and ahead else float(not ahead)
            self.near[last, usual, loop] = {
                action: part * weight / sum(weights.values())
                for part, weights in ((share, back), (1 - share, ahead)) for action, weight in weights.items()}
        return self.near[last, usual, loop] or {usual: 1}

    def priors(self, last):
        """The policy after a layer: {action: probability}, most likely first."""
        if last not in self.known_priors:
            row, priors = self.table.get(last, {last + 1: 1}), {}
            total = sum(row.values())
            for usual, weight in row.items():
                share = weight / total
                priors[usual] = priors.get(usual, 0) + share * (1 - self.departure)
                for action, probability in self.around(last, usual).items():
                    priors[action] = priors.get(action, 0) + share * self.departure * probability
            self.known_priors[last] = dict(sorted(priors.items(), key=lambda item: -item[1]))
        return self.known_priors[last]

    def draw(self, last):
        """An action drawn from the policy after a layer."""
        if last not in self.known_draws:
            priors = self.priors(last)
            self.known_draws[last] = [*priors], [*accumulate(priors.values())]
        actions, cumulative = self.known_draws[last]
        return actions[bisect(cumulative, self.rng.random() * cumulative[-1], hi=len(actions) - 1)]

    def select(self):
        """Walks down the tree and adds the first new node: the nodes on the way, and their actions."""
        node, path, actions = self.root, [self.root], ()
        while self.learn and node.visits >= MATURE and not node.closed:
            priors, width = self.priors(actions[-1] if actions else -1), self.exploration * math.sqrt(node.visits)
            untried = [action for action in priors if action not in node.children][:1]  # the others have lower bounds
            action = max([*node.children, *untried], key=lambda action: node.bound(action, priors[action], width))
            if not untried and node.children[action].closed:  # then all are
                node.closed = True
                break
            node = node.children.setdefault(action, Node())
            path.append(node)
            actions += (action,)
            node.closed = action == self.stop or len(actions) > self.limit
        for node in path:
            node.visits += 1  # before its value is known: a virtual loss
        return path, actions

    def roll_out(self, actions, pending):
        """Completes a prefix with the policy: a chain that is new and within the limit, or None after TRIES others."""
        for _ in range(TRIES):
            chain = [*actions]
            while chain[-1:] != [self.stop] and len(chain) <= self.limit:
                chain.append(self.draw(chain[-1] if chain else -1))
            if chain[-1:] == [self.stop]:
                chain = tuple(chain[:-1])
                if chain not in self.result.evaluated and chain not in pending:
                    return chain
        return None


def back_up(path, value):
    for node in path:
        node.value += value


def split(chain, score):
    """A score as (score, promise), the promise None where there is none. Raises ValueError if it is malformed."""
    match score:
        case (Real() as number, Real() as promise) if 0 <= number <= 1 and promise <= 0:
            return number, promise
        case Real() if 0 <= score <= 1:  # also false for NaN
            return score, None
    raise ValueError(f"the score of chain {list(chain)} is {score!r}; return a number from 0 to 1, or such a number and "
                     "a promise, a log-probability of 0 or less")


def search(score, n_layers, simulations=200, seed=0, depth_penalty=0.2, exploration=8.0, max_skip=None, max_loop=4,
           batch=8, learn=True, promise=True):
    """Searches for a chain of high reward.

    Args:
      score: callable, a list of chains (tuples of layer indices) to a list of scores: numbers in [0, 1] (a bool is
        one), or pairs of such a number and a promise, the mean log-probability of the correct answer's tokens.
      n_layers: layers of the model.
      simulations: how many distinct chains to evaluate, the full-depth chain first.
      seed: the same seed, batch and scores give the same result.
      depth_penalty: what the full depth costs in the reward, where a correct answer is worth 1.
      exploration: the constant c of the upper confidence bound; higher tries unlikely actions more often.
      max_skip, max_loop: how many layers one step may skip (None: any number) and go back; chains hold up to
        2 * n_layers steps.
      batch: how many chains to ask `score` for at a time. Until its score is in, a simulation counts as a visit of
        value 0, so that the next ones go elsewhere.
      learn: False draws every chain from the policy around the full-depth chain, with no tree: a control.
      promise: False ignores promises: a control.
    Returns a Result. It holds fewer than `simulations` chains only if there are no more; the control also gives up
    once it draws nothing but known chains.
    Raises ValueError for a number out of range, and for scores that are malformed or not one for each chain.
    """
    max_skip = n_layers if max_skip is None else max_skip
    for name, value, least in [("n_layers", n_layers, 1), ("simulations", simulations, 1), ("batch", batch, 1),
                               ("max_skip", max_skip, 0), ("max_loop", max_loop, 0),
                               ("depth_penalty", depth_penalty, 0), ("exploration", exploration, 0)]:
        if not least <= value < math.inf:
            raise ValueError(f"{name} must be {least} or more, not {value}")
    state = Search(n_layers, seed, depth_penalty, exploration, max_skip, max_loop, learn, promise)
    evaluated, pending = state.result.evaluated, {tuple(range(n_layers)): []}  # {chain: the nodes on the way to it}
    while pending:
        scores = list(score([*pending]))
        if len(scores) != len(pending):
            raise ValueError(f"score returned {len(scores)} scores for the {len(pending)} chains from "
                             f"{list(next(iter(pending)))} on; return one for each")
        state.take(pending, scores)
        for chain, path in pending.items():
            back_up(path, state.value(chain))
        pending, fruitless = {}, 0
        while len(pending) < min(batch, simulations - len(evaluated)):
            if state.root.closed and not pending and state.limit < 2 * n_layers:
                state.root, state.limit = Node(), 2 * n_layers  # nothing better is left: on to deeper chains
            if state.root.closed or fruitless >= 50 * batch and (pending or not learn):
                break
            path, actions = state.select()  # and expand
            chain = state.roll_out(actions, pending)
            if chain is not None:
                pending[chain] = path
            else:
                fruitless += 1
                back_up(path, -depth_penalty * state.limit / n_layers)  # the lowest value there is
    return state.result
