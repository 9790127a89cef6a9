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
  - A rollout that comes to a known chain, or to one too deep, is drawn again: a chain's score does not change. After a
    simulation that finds no new chain all the same, the rollouts of that batch leave the best chain more often.
  - A chain so deep that even a full score would not make it the best waits until there are no others (branch and
    bound): at that depth a walk stops.
  - When a better chain is found, or one as good, the tree starts anew around it.

References: [1] UCT, Kocsis & Szepesvari 2006. [2] PUCT, Silver et al. 2016.
CoLa, arXiv 2507.07996, section 3: its search edits whole chains by blocks; ours builds them layer by layer.
"""
import math
import random
from bisect import bisect
from dataclasses import dataclass
from itertools import accumulate

EDITS = 1.6  # how often the default policy leaves the best chain, in n_layers steps
LOOP, EARLY_LOOP = 0.25, 0.65  # the share of these that loops, once something is right and before; others skip or stop
TRIES = 10  # rollouts from a node, until one gives a new chain
WIDEN = 1.2  # factor on how often rollouts leave the best chain, after a simulation that found no new one
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


@dataclass
class Policy:
    """The default policy after a prefix.

    Attributes:
      actions: first the one that follows the best chain, then the others, likeliest first.
      priors: {action: its probability}.
      cumulative: running sums of the probabilities of `actions` once the best chain is left, to draw one by bisection.
    """
    actions: list
    priors: dict
    cumulative: list


class Search:
    """The state of a search; arguments as in `search`. An action is a layer to append, or `stop`.

    A walk keeps a `position`: the index in `best` of the layer that it appends next if it follows it; len(best) is
    where it stops.

    Attributes:
      best: the chain that the default policy follows: the best so far, until one is right the full-depth chain.
      limit: the depth beyond which not even a full score would make a chain the best; 2 * n_layers again once nothing
        else is left.
      loop: LOOP or EARLY_LOOP.
      leave: probability of leaving the best chain at a step.
      ends: for each layer, the positions in the best chain that a walk may have after appending it: behind a use of
        the layer, else where the best chain skips it, else the end.
      known: the chains that were evaluated or are about to be.
      policies: {(last layer, action that follows the best chain, loop): Policy}.
    """

    def __init__(self, n_layers, seed, depth_penalty, exploration, max_skip, max_loop, learn):
        self.n_layers, self.exploration, self.max_skip, self.max_loop = n_layers, exploration, max_skip, max_loop
        self.stop = n_layers  # as if it were one layer more: in a full-depth chain the step after the last
        self.rng, self.result, self.learn = random.Random(seed), Result({}, n_layers, depth_penalty), learn
        self.limit, self.loop, self.leave, self.policies = 2 * n_layers, EARLY_LOOP, min(0.5, EDITS / n_layers), {}
        self.restart(tuple(range(n_layers)))
        self.known = {self.best}

    def restart(self, chain):
        """Follows another chain, with a new tree: what nodes say of the ways around the one before is out of date."""
        self.best, self.root = chain, Node()
        self.ends = []
        for layer in range(self.n_layers):
            after_use = [i + 1 for i, used in enumerate(chain) if used == layer]
            after_skip = [i for i, used in enumerate(chain) if used > layer and (i == 0 or chain[i - 1] < layer)]
            self.ends.append(after_use or after_skip or [len(chain)])

    def window(self, last):
        """The layers that may be appended after the layer `last` (-1 before the first)."""
        return range(max(0, last + 1 - self.max_loop), min(self.n_layers, last + 2 + self.max_skip))

    def policy(self, chain, position):
        """The Policy after a prefix of a chain that has come to a position in the best chain."""
        last = chain[-1] if chain else -1
        follow = self.best[position] if position < len(self.best) else self.stop
        if (last, follow, self.loop) not in self.policies:
            actions = [*self.window(last), self.stop]
            back = {action: 1 / (follow - action) for action in actions if action < follow}
            ahead = {action: 1 / (action - follow) for action in actions if action > follow}
            away = {follow: 0.0}
            for share, weights in (self.loop, back), (1 - self.loop, ahead):
                away |= {action: share * weight / sum(weights.values()) for action, weight in weights.items()}
            away[follow] = max(0, 1 - sum(away.values()))  # the share of what there is none of
            priors = {action: self.leave * share for action, share in away.items()}
            priors[follow] += 1 - self.leave
            actions = sorted(priors, key=priors.get, reverse=True)
            self.policies[last, follow, self.loop] = Policy(actions, priors, [*accumulate(map(away.get, actions))])
        return self.policies[last, follow, self.loop]

    def rejoin(self, layer, position):
        """The position after appending a layer: of its `ends` the nearest to the old one, of two the earlier."""
        ends = self.ends[layer]  # mostly one, and min() is slow
        return ends[0] if len(ends) == 1 else min(ends, key=lambda end: abs(end - 1 - position))

    def select(self, node, policy):
        """The open action of highest upper confidence bound Q + c * prior * sqrt(parent's visits) / (1 + visits).

        Q is the mean reward of the simulations that took the action; where none did, the mean reward of all. None if
        all actions are closed.
        """
        children, width = node.children, self.exploration * math.sqrt(node.visits)
        best, highest = None, -math.inf
        for action in policy.actions:  # the likeliest first: of the untried no other can have a higher bound
            if action not in children:
                best, highest = action, node.value / node.visits + width * policy.priors[action]
                break
        for action, child in children.items():
            if not child.closed:
                bound = child.value / child.visits + width * policy.priors[action] / (1 + child.visits)
                if bound > highest:
                    best, highest = action, bound
        return best

    def simulate(self, leave):
        """One walk: the nodes on its way, and a chain that is not known; None where it found none.

        `leave` is the probability of leaving the best chain at a step of a rollout.
        """
        node, path, chain, position = self.root, [self.root], [], 0
        while self.learn and node.visits >= MATURE:
            policy = self.policy(chain, position)
            action = self.select(node, policy)
            if action is None:
                node.closed = True
                return path, None
            if action not in node.children:
                node.children[action] = Node()
            node = node.children[action]
            path.append(node)
            if action != self.stop:
                chain.append(action)
            if action == self.stop or len(chain) >= self.limit:
                node.closed = True
                new = tuple(chain)
                return path, None if new in self.known or len(new) > self.limit else new
            position = self.rejoin(action, position)
        for _ in range(TRIES):
            new = self.rollout(chain, position, leave)
            if len(new) <= self.limit and new not in self.known:
                return path, new
        return path, None

    def rollout(self, chain, position, leave):
        """The chain completed with the default policy, or cut off where it is too deep."""
        chain, best, draw, log_stay = [*chain], self.best, self.rng.random, math.log(1 - leave)
        while len(chain) <= self.limit:
            stay = int(math.log(1 - draw()) / log_stay)  # steps until the best chain is left: a geometric variable
            chain += best[position:position + stay]
            position += stay
            if position > len(best):
                break
            policy = self.policy(chain, position)
            action = policy.actions[bisect(policy.cumulative, draw() * policy.cumulative[-1])]
            if action == self.stop:
                break
            chain.append(action)
            position = self.rejoin(action, position)
        return tuple(chain)

    def propose(self, count):
        """Up to `count` chains to evaluate, as {chain: the nodes on the way to it}."""
        pending, leave = {}, self.leave
        for _ in range(20 * count):  # not for ever: most find nothing new where few chains are left
            path, chain = self.simulate(leave)
            for node in path:
                node.visits += 1
            if chain is None:
                leave = min(0.5, leave * WIDEN)
                # The worst reward there is, that of a wrong chain of the greatest depth, sends the next ones elsewhere.
                self.back_up(path, -self.result.depth_penalty * self.limit / self.n_layers)
            else:
                pending[chain] = path
                self.known.add(chain)
            if self.root.closed or len(pending) == count:
                break
        return pending

    def back_up(self, path, reward):
        for node in path:
            node.value += reward

    def update(self, pending, scores):
        """Takes the scores of proposed chains in, and follows the best of them if it is as good as the one so far."""
        evaluated, reward = self.result.evaluated, self.result.reward
        evaluated.update(zip(pending, scores, strict=True))
        for chain, path in pending.items():
            self.back_up(path, reward(chain))
        new = max(pending, key=lambda chain: (evaluated[chain] > 0, reward(chain)))
        # One as good is taken too: the search drifts along a plateau.
        if self.learn and evaluated[new] and (not evaluated[self.best] or reward(new) >= reward(self.best)):
            self.restart(new)
            self.loop = LOOP
            if self.result.depth_penalty:
                # The depth at which a full score comes to the reward of the best chain.
                depth = (1 - reward(new)) * self.n_layers / self.result.depth_penalty
                self.limit = int(min(2 * self.n_layers, depth + 1e-6))


def search(score, n_layers, simulations=200, seed=0, depth_penalty=0.2, exploration=8.0, max_skip=None, max_loop=4,
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
      batch: how many chains to ask `score` for at a time; until its score is in, a walk counts as a visit of reward 0.
        That mostly lowers the bounds on its way, and the next walks go elsewhere (a weak virtual loss).
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
    state = Search(n_layers, seed, depth_penalty, exploration, max_skip, max_loop, learn)
    evaluated = state.result.evaluated
    state.update({state.best: []}, score([state.best]))
    while len(evaluated) < simulations:
        pending = state.propose(min(batch, simulations - len(evaluated)))
        if pending:
            state.update(pending, score([*pending]))
        elif state.root.closed and state.limit < 2 * n_layers:  # nothing better is left: on to deeper chains
            state.limit, state.root = 2 * n_layers, Node()
        elif state.root.closed or not learn:
            break
    return state.result
