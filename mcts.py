"""Monte Carlo Tree Search for a chain of layers: UCT over "append a layer" and "stop".

A node of the tree is a prefix of a chain. After a prefix whose last layer is l, the actions are to append a layer from
l + 1 - max_loop to l + 1 + max_skip, or to stop, which completes the chain. Appending l + 1 goes on to the next layer,
less than that loops, more skips; stopping before the last layer is an early exit. One simulation
  1. selects: walks down the tree by upper confidence bounds,
  2. expands: adds the first node it comes to that is new, below one of MATURE visits,
  3. rolls out: completes the chain from there with the default policy,
  4. backs up: adds the chain's reward to every node on the way.
That is UCT [1] with priors in the bound [2]. What we added, each measured in the README:
  - The default policy does what the best chain found so far does. At times it leaves that chain, to skip, loop or stop,
    and goes on with it from where it meets it again. Its probabilities are the priors of the tree.
  - It likes a step (last layer, action) the more, the higher the mean score of the chains that took this step. All
    prefixes share this statistic, as in move-average sampling [3].
  - It leaves the best chain more often where walks mostly lead to chains that are known already.
  - A chain so deep that even a full score would not make it the best is not evaluated (branch and bound).
  - When a better chain is found, or one as good, the tree starts anew around it; the statistics stay.
  - The tree guides a walk through nodes of MATURE visits: the mean of fewer rewards says little.

References: [1] UCT, Kocsis & Szepesvari 2006. [2] PUCT, Silver et al. 2016. [3] MAST, Finnsson & Bjornsson 2008.
CoLa, arXiv 2507.07996, section 3: its search edits whole chains by blocks; ours builds them layer by layer.
"""
import math
import random
from bisect import bisect
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate, pairwise

START, STOP = -1, -2  # what stands before the first layer; the action that ends a chain
EDITS = 1.6  # how often the default policy leaves the best chain, in n_layers steps with every action open; of these,
EXIT = 0.05  # the share that stops,
LOOP, EARLY_LOOP = 0.25, 0.65  # that loops, once something is right and before; the rest skips
ELSEWHERE = 0.3  # weight of a skip to a layer that is not in the best chain; to one that is: 1
WIDEN = 2  # factor on EDITS each time that most walks led to known chains
DOUBT = 2  # how many chains of mean score a step is credited with before any took it
MATURE = 8  # visits from which a node chooses among its children; until then walks go on from it as rollouts


@dataclass
class Result:
    """What a search found.

    Attributes:
      evaluated: {chain: score} in order of evaluation, the full-depth chain first.
      n_layers, depth_penalty: as given to `search`.
    """
    evaluated: dict
    n_layers: int
    depth_penalty: float

    def reward(self, chain):
        """Score - depth_penalty * depth / n_layers."""
        return self.evaluated[chain] - self.depth_penalty * len(chain) / self.n_layers

    def right(self):
        """The chains with score > 0, in order of reward, highest first; of equals the shorter, then the earlier."""
        right = [chain for chain, score in self.evaluated.items() if score > 0]
        return sorted(right, key=lambda chain: (-self.reward(chain), len(chain)))

    @property
    def best(self):
        """The first of `right()` (for a bool score: the shortest right chain), or None."""
        return next(iter(self.right()), None)


class Node:
    """A prefix of a chain, or, below the action STOP, a complete chain.

    Attributes:
      children: {action: Node}; a node stands here once it was visited.
      visits, value: simulations that came through, and the sum of their rewards.
      closed: there is nothing left to evaluate below.
    """
    __slots__ = ("children", "visits", "value", "closed")

    def __init__(self):
        self.children, self.visits, self.value, self.closed = {}, 0, 0.0, False


class Search:
    """The state of a search; arguments as in `search`.

    Attributes:
      best: the chain that the default policy follows: the best so far, until one is right the full-depth chain.
      limit: the depth beyond which not even a full score would make a chain the best.
      edits: EDITS, times WIDEN now and then.
      tried, scores: {(last layer, action): how many chains took this step, and the sum of their scores}.
      policies: the default policy where it was needed since it last changed.
    """

    def __init__(self, n_layers, seed, depth_penalty, exploration, max_skip, max_loop):
        self.n_layers, self.exploration, self.max_skip, self.max_loop = n_layers, exploration, max_skip, max_loop
        self.rng, self.result = random.Random(seed), Result({}, n_layers, depth_penalty)
        self.best, self.limit, self.edits = tuple(range(n_layers)), 2 * n_layers, EDITS
        self.root, self.mature, self.tried, self.scores, self.policies = Node(), MATURE, Counter(), Counter(), {}

    def policy(self, last, position):
        """The default policy after the layer `last`, come to a position of the best chain.

        Returns the actions, the likeliest first, their cumulative probabilities, {action: probability}, and
        {action: the position it leads to}.
        """
        window = range(max(0, last + 1 - self.max_loop), min(self.n_layers, last + 2 + self.max_skip))
        ahead, solved = self.best[position:], any(self.scores.values())
        likely = min(max(ahead[0], window[0]), window[-1]) if ahead and window else STOP
        here, loop = last + 1 if likely == STOP else likely, LOOP if solved else EARLY_LOOP
        skips = {layer: (1 if layer in ahead else ELSEWHERE) / (layer - here)
                 for layer in window if layer > here and likely != STOP}
        loops = {layer: 1 / max(1, here - layer) for layer in window if layer < here or likely == STOP}
        leave = min(0.5, self.edits / self.n_layers)
        weights = {likely: 1 - leave}
        for share, kind in [(1 - loop - EXIT, skips), (loop, loops), (EXIT, {STOP: 1})]:
            for action, weight in kind.items():
                weights.setdefault(action, leave * share * weight / sum(kind.values()))
        if solved:
            mean = sum(self.result.evaluated.values()) / len(self.result.evaluated)
            for action in weights:
                step = last, action
                weights[action] *= (self.scores[step] / mean + DOUBT) / (self.tried[step] + DOUBT)
        total, actions = sum(weights.values()), sorted(weights, key=weights.get, reverse=True)
        priors = {action: weights[action] / total for action in actions}
        self.policies[last, position] = (actions, [*accumulate(priors.values())], priors,
                                         {action: self.follow(action, position) for action in actions})
        return self.policies[last, position]

    def follow(self, layer, position):
        """The position of the best chain after a layer: behind its nearest use, or before the first deeper layer."""
        uses = [i for i, used in enumerate(self.best) if used == layer]
        if uses:
            return min(uses, key=lambda i: abs(i - position)) + 1
        return next((i for i in range(position, len(self.best)) if self.best[i] > layer), len(self.best))

    def select(self, node, priors):
        """The open action of highest upper confidence bound, or None."""
        children, width = node.children, self.exploration * math.sqrt(node.visits)
        best, highest = None, -math.inf
        for action in priors:  # the likeliest first: of the untried no other can have a higher bound
            if action not in children:
                best, highest = action, node.value / node.visits + width * priors[action]
                break
        for action, child in children.items():
            if not child.closed:
                bound = child.value / child.visits + width * priors[action] / (1 + child.visits)
                if bound > highest:
                    best, highest = action, bound
        return best

    def simulate(self):
        """One walk from the root: the nodes on its way, and the chain; None if that is too deep or nothing is open."""
        node, path, chain, last, position = self.root, [self.root], [], START, 0
        while len(chain) <= self.limit:
            actions, cumulative, priors, positions = self.policies.get((last, position)) or self.policy(last, position)
            if node and node.visits >= self.mature:  # selection, and expansion by the last node that it comes to
                last = self.select(node, priors)
                if last is None:
                    break
                node = node.children.setdefault(last, Node())
                path.append(node)
            else:  # rollout
                node, last = None, actions[bisect(cumulative, self.rng.random() * cumulative[-1])]
            if last == STOP:
                break
            chain.append(last)
            position = positions[last]
        if node:  # the walk ended inside the tree
            node.closed = True
        return path, tuple(chain) if last == STOP else None

    def propose(self, count):
        """Up to `count` chains to evaluate, as {chain: the walks that led to it}."""
        pending = {}
        for walks in range(1, 4 * count + 20):
            path, chain = self.simulate()
            for node in path:
                node.visits += 1
            if chain is None:
                self.back_up(path, -self.result.depth_penalty * self.limit / self.n_layers)  # as if it were wrong
            elif chain in self.result.evaluated:
                self.back_up(path, self.result.reward(chain))
            else:
                pending.setdefault(chain, []).append(path)
            if self.root.closed or len(pending) == count:
                break
        if walks > 2 * count + 16:  # most led to known chains
            self.edits *= WIDEN
            self.policies.clear()
        return pending

    def back_up(self, path, reward):
        for node in path:
            node.value += reward

    def learn(self, chains):
        """Takes new chains into the statistics and, where one is good enough, as the best chain."""
        for chain in chains:
            for step in set(pairwise((START, *chain, STOP))):
                self.tried[step] += 1
                self.scores[step] += self.result.evaluated[chain]
        self.policies.clear()
        right = [chain for chain in chains if self.result.evaluated[chain] > 0]
        reward, new = self.result.reward, max(right, key=self.result.reward, default=None)
        # One as good is taken too: the search drifts along a plateau.
        if right and (not self.result.evaluated[self.best] or reward(new) >= reward(self.best)):
            self.best, self.root, self.edits = new, Node(), EDITS
            if self.result.depth_penalty:
                spare = (1 - self.result.evaluated[new]) * self.n_layers / self.result.depth_penalty
                self.limit = int(min(2 * self.n_layers, len(new) + spare + 1e-6))


def search(score, n_layers, simulations=200, seed=0, depth_penalty=0.2, exploration=2.0, max_skip=None, max_loop=4,
           batch=16, learn=True):
    """Searches a chain of high reward.

    Args:
      score: callable, a list of chains (tuples of layer indices) to a list of numbers in [0, 1] (a bool is one).
      n_layers: layers of the model.
      simulations: how many distinct chains to evaluate, the full-depth chain first.
      seed: the same seed, batch and scores give the same result.
      depth_penalty: what the full depth costs in the reward, where a right answer is worth 1.
      exploration: the constant c of the upper confidence bound; higher tries unlikely actions more often.
      max_skip, max_loop: the window of layers that may be appended (see above), max_skip None for all that are ahead;
        chains hold up to 2 * n_layers steps.
      batch: how many chains to ask `score` for at a time; until then a walk counts as a visit without reward, so that
        the next ones go elsewhere (in place of a virtual loss).
      learn: False draws every chain from the default policy around the full-depth chain, with no tree and with nothing
        learned from scores: a control.
    Returns a Result. It holds fewer than `simulations` chains only where there are no more; the control also gives up
    where its walks lead to known chains alone.
    Raises ValueError for a number out of range.
    """
    max_skip = n_layers if max_skip is None else max_skip
    for name, value, least in [("n_layers", n_layers, 1), ("simulations", simulations, 1), ("batch", batch, 1),
                               ("max_skip", max_skip, 0), ("max_loop", max_loop, 0),
                               ("depth_penalty", depth_penalty, 0), ("exploration", exploration, 0)]:
        if not least <= value < math.inf:
            raise ValueError(f"{name} must be {least} or more, not {value}")
    tree = Search(n_layers, seed, depth_penalty, exploration, max_skip, max_loop)
    evaluated = tree.result.evaluated
    evaluated[tree.best] = score([tree.best])[0]
    if learn:
        tree.learn([tree.best])
    else:
        tree.mature = math.inf
    while len(evaluated) < simulations:
        pending = tree.propose(min(batch, simulations - len(evaluated)))
        if pending:
            evaluated.update(zip(pending, score([*pending]), strict=True))
            for chain, paths in pending.items():
                for path in paths:
                    tree.back_up(path, tree.result.reward(chain))
            if learn:
                tree.learn(pending)
        elif tree.root.closed and tree.limit < 2 * n_layers:  # nothing better is left: on to deeper chains
            tree.limit, tree.root = 2 * n_layers, Node()
        elif tree.root.closed or not learn:
            break
    return tree.result
