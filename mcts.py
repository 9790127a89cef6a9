"""Monte Carlo Tree Search for a chain of layers: UCT over "append a layer" and "stop".

A node of the tree is a prefix of a chain. After a prefix whose last layer is l, the actions are to append a layer from
l + 1 - max_loop to l + 1 + max_skip, or to stop, which completes the chain. Appending l + 1 goes on to the next layer,
less than that loops, more skips; stopping before the last layer is an early exit. One simulation
  1. selects: walks down the tree by upper confidence bounds, as far as nodes have MATURE visits,
  2. expands: adds the node that it comes to there,
  3. rolls out: completes the chain from there with the default policy,
  4. backs up: adds the chain's reward to every node on the way.
That is UCT [1] with priors in the bound [2]. What we added, each measured in the README:
  - The default policy follows the best chain found so far. Now and then it leaves it, to skip, loop or stop, and goes
    on with it from where it meets it again. Its probabilities are the priors of the tree.
  - A rollout that comes to a known chain is drawn again: a chain's score does not change. Where that seldom helps, the
    default policy leaves the best chain more often.
  - A chain so deep that even a full score would not make it the best is not evaluated (branch and bound).
  - When a better chain is found, or one as good, the tree starts anew around it.

References: [1] UCT, Kocsis & Szepesvari 2006. [2] PUCT, Silver et al. 2016.
CoLa, arXiv 2507.07996, section 3: its search edits whole chains by blocks; ours builds them layer by layer.
"""
import math
import random
from bisect import bisect
from dataclasses import dataclass
from itertools import accumulate

EDITS = 1.6  # how often the default policy leaves the best chain, in n_layers steps; of these,
EXIT = 0.05  # the share that stops,
LOOP, EARLY_LOOP = 0.25, 0.65  # that loops, once something is right and before; the rest skips
ELSEWHERE = 0.3  # weight of a skip to a layer that is not in the rest of the best chain; to one that is: 1
TRIES = 10  # rollouts from a node, until one gives a chain that is not known
WIDEN = 2  # factor on EDITS each time that these tries mostly fail
MATURE = 8  # visits from which a node chooses among its children: the mean of fewer rewards says little


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
    """A prefix of a chain, or, below the action stop, a complete chain.

    Attributes:
      children: {action: Node}; a node stands here once it was visited.
      visits, value: simulations that came through, and the sum of their rewards.
      closed: there is nothing left to evaluate below.
    """
    __slots__ = ("children", "visits", "value", "closed")

    def __init__(self):
        self.children, self.visits, self.value, self.closed = {}, 0, 0.0, False


class Search:
    """The state of a search; arguments as in `search`. An action is a layer to append, or `stop`.

    Attributes:
      best: the chain that the default policy follows: the best so far, until one is right the full-depth chain.
      limit: the depth beyond which not even a full score would make a chain the best.
      loop, leave: LOOP or EARLY_LOOP; probability of leaving the best chain at a step.
      known: the chains that were evaluated or are about to be.
      policies: what `policy` returned, until `best`, `loop` or `leave` changes.
    """

    def __init__(self, n_layers, seed, depth_penalty, exploration, max_skip, max_loop):
        self.n_layers, self.exploration, self.max_skip, self.max_loop = n_layers, exploration, max_skip, max_loop
        self.stop = n_layers  # as if it were one layer more: in a full-depth chain the step after the last
        self.rng, self.result = random.Random(seed), Result({}, n_layers, depth_penalty)
        self.best, self.limit, self.mature = tuple(range(n_layers)), 2 * n_layers, MATURE
        self.root, self.loop, self.known = Node(), EARLY_LOOP, {self.best}
        self.leave_with(EDITS / n_layers)

    def leave_with(self, probability):
        self.leave, self.policies = min(0.5, probability), {}
        self.log_stay = math.log(1 - self.leave)

    def window(self, last):
        """The layers that may be appended after the layer `last` (-1 before the first)."""
        return range(max(0, last + 1 - self.max_loop), min(self.n_layers, last + 2 + self.max_skip))

    def policy(self, last, position):
        """The default policy after the layer `last`, come to a position of the best chain.

        Returns {action: probability}, the likeliest first; {action: the position it leads to}; and, for when the best
        chain is left, a list of (action, position) and their cumulative probabilities.
        """
        stop, ahead = self.stop, self.best[position:]
        follow = ahead[0] if ahead else stop
        window = self.window(last)
        loops = {layer: 1 / (follow - layer) for layer in window if layer < follow}
        skips = {layer: (1 if layer in ahead else ELSEWHERE) / (layer - follow) for layer in window if layer > follow}
        exits = {stop: 1} if follow < stop else {}
        away = {}
        for share, kind in (self.loop, loops), (1 - self.loop - EXIT, skips), (EXIT, exits):
            away |= {action: share * weight / sum(kind.values()) for action, weight in kind.items()}
        away[follow] = max(0, 1 - sum(away.values()))  # the share of kinds that are not open here
        priors = {action: self.leave * probability for action, probability in away.items()}
        priors[follow] += 1 - self.leave
        priors = dict(sorted(priors.items(), key=lambda item: -item[1]))
        positions = {action: self.rejoin(action, position) for action in priors}
        moves = [(action, positions[action]) for action in away]
        self.policies[last, position] = priors, positions, moves, [*accumulate(away.values())]
        return self.policies[last, position]

    def rejoin(self, layer, position):
        """Where the best chain goes on after a layer: behind its nearest use, or where the chain steps over it."""
        best = self.best
        ends = ([i + 1 for i, used in enumerate(best) if used == layer]
                or [i for i, used in enumerate(best) if used > layer and (i == 0 or best[i - 1] < layer)]
                or [len(best)])
        return min(ends, key=lambda end: abs(end - 1 - position))

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
        """One walk: the nodes on its way, and a chain that is not known; None where it found none."""
        node, path, chain, last, position = self.root, [self.root], [], -1, 0
        while node.visits >= self.mature:
            priors, positions, _, _ = self.policies.get((last, position)) or self.policy(last, position)
            last = self.select(node, priors)
            if last is None or len(chain) > self.limit:
                node.closed = True
                return path, None
            node = node.children.setdefault(last, Node())
            path.append(node)
            if last == self.stop:
                node.closed = True
                return path, tuple(chain) if tuple(chain) not in self.known else None
            chain.append(last)
            position = positions[last]
        for _ in range(TRIES):
            new = self.rollout(chain, last, position)
            if len(new) <= self.limit and new not in self.known:
                return path, new
        return path, None

    def rollout(self, chain, last, position):
        """The chain completed with the default policy, or cut off where it is too deep."""
        chain, best, draw = [*chain], self.best, self.rng.random
        while len(chain) <= self.limit:
            stay = int(math.log(1 - draw()) / self.log_stay)  # steps until the best chain is left
            if stay:
                chain += best[position:position + stay]
                position += stay
                if position > len(best):
                    break
                last = chain[-1]
            _, _, moves, cumulative = self.policies.get((last, position)) or self.policy(last, position)
            last, position = moves[bisect(cumulative, draw() * cumulative[-1])]
            if last == self.stop:
                break
            chain.append(last)
        return tuple(chain)

    def propose(self, count):
        """Up to `count` chains to evaluate, as {chain: the nodes on the way to it}."""
        pending = {}
        for walks in range(1, 4 * count + 20):
            path, chain = self.simulate()
            for node in path:
                node.visits += 1
            if chain is None:  # as if it were wrong
                self.back_up(path, -self.result.depth_penalty * self.limit / self.n_layers)
            else:
                pending[chain] = path
                self.known.add(chain)
            if self.root.closed or len(pending) == count:
                break
        if walks > 2 * count + 8:
            self.leave_with(self.leave * WIDEN)
        return pending

    def back_up(self, path, reward):
        for node in path:
            node.value += reward

    def learn(self, chains):
        """Follows the best of these new chains, if it is as good as the one followed so far."""
        reward = self.result.reward
        new = max(chains, key=lambda chain: (self.result.evaluated[chain] > 0, reward(chain)))
        # One as good is taken too: the search drifts along a plateau.
        if self.result.evaluated[new] and (not self.result.evaluated[self.best] or reward(new) >= reward(self.best)):
            self.best, self.root, self.loop = new, Node(), LOOP
            self.leave_with(EDITS / self.n_layers)
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
            for chain, path in pending.items():
                tree.back_up(path, tree.result.reward(chain))
            if learn:
                tree.learn(pending)
        elif tree.root.closed and tree.limit < 2 * n_layers:  # nothing better is left: on to deeper chains
            tree.limit, tree.root = 2 * n_layers, Node()
        elif tree.root.closed or not learn:
            break
    return tree.result
