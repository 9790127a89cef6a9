"""Monte Carlo Tree Search for a chain of layers: UCT over "append a layer" and "stop".

A node of the tree is a prefix of a chain. After a prefix whose last layer is l, the actions are to append a layer from
l + 1 - max_loop to l + 1 + max_skip, or to stop, which completes the chain. Appending l + 1 goes on to the next layer,
less than that loops, more skips; stopping before the last layer is an early exit. One simulation
  1. selects: walks down the tree by upper confidence bounds,
  2. expands: adds the first node it comes to that is new,
  3. rolls out: completes the chain from there with the default policy,
  4. backs up: adds the chain's reward to every node on the way.
The default policy mostly does what the best chain found so far does; at times it skips, loops or stops there, and then
goes on with the best chain. The same weights are the prior of step 1, so the tree grows along promising chains instead
of level by level. When a better chain is found the tree starts anew, for its priors followed the old one.

References: UCT, Kocsis & Szepesvari 2006; priors in the bound (PUCT), Silver et al. 2016; CoLa, arXiv 2507.07996,
section 3 (its search edits whole chains by blocks; ours builds them layer by layer).
"""
import math
import random
from dataclasses import dataclass

STOP = -1  # an action, beside the layers 0, 1, 2, ...
EDITS = 2.4  # how often a rollout of full depth leaves the best chain, on average, and to do what:
SKIP, LOOP, EXIT = 0.7, 0.25, 0.05


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
      prior: {action: weight}, empty until the node is visited a second time.
      children: {action: Node}; a node stands here once it was visited.
      visits, value: simulations that came through, and the sum of their rewards.
      closed: every chain below was evaluated, so there is nothing left to visit.
    """
    __slots__ = ("prior", "children", "visits", "value", "closed")

    def __init__(self):
        self.prior, self.children, self.visits, self.value, self.closed = {}, {}, 0, 0.0, False


def search(score, n_layers, simulations=200, seed=0, depth_penalty=0.2, exploration=2.0, max_skip=4, max_loop=4,
           batch=16):
    """Searches a chain of high reward.

    Args:
      score: callable, a list of chains (tuples of layer indices) to a list of numbers in [0, 1] (a bool is one).
      n_layers: layers of the model.
      simulations: how many distinct chains to evaluate, the full-depth chain first.
      seed: the same seed, batch and scores give the same result.
      depth_penalty: what the full depth costs in the reward, where a right answer is worth 1.
      exploration: the constant c of the upper confidence bound; higher tries unlikely actions more often.
      max_skip, max_loop: the window of layers that may be appended (see above); chains hold up to 2 * n_layers steps.
      batch: how many chains to ask `score` for at a time; until then a walk counts as a visit without reward, so that
        the next ones go elsewhere (virtual loss).
    Returns a Result. It holds fewer than `simulations` chains only where there are no more.
    Raises ValueError for a number out of range.
    """
    for name, value, least in [("n_layers", n_layers, 1), ("simulations", simulations, 1), ("batch", batch, 1),
                               ("max_skip", max_skip, 0), ("max_loop", max_loop, 0),
                               ("depth_penalty", depth_penalty, 0), ("exploration", exploration, 0)]:
        if not value >= least:
            raise ValueError(f"{name} must be {least} or more, not {value}")
    rng = random.Random(seed)
    full = tuple(range(n_layers))
    result = Result({full: score([full])[0]}, n_layers, depth_penalty)
    best, root, deviation = full, Node(), min(0.5, EDITS / n_layers)

    def policy(prefix, position):
        """The weight of each action after a prefix that has come to this position of the best chain."""
        if len(prefix) == 2 * n_layers:
            return {STOP: 1.0}
        last = prefix[-1] if prefix else -1
        window = range(max(0, last + 1 - max_loop), min(n_layers, last + 2 + max_skip))
        likely = STOP
        if window and position < len(best):
            likely = min(max(best[position], window[0]), window[-1])
        ahead = [layer for layer in window if likely != STOP and layer > likely]
        back = [layer for layer in window if likely == STOP or layer < likely]
        weights = {likely: 1 - deviation}
        for share, actions in [(SKIP, ahead), (LOOP, back), (EXIT, [STOP])]:
            for action in actions:
                weights.setdefault(action, deviation * share / len(actions))
        return weights

    def follow(layer, position):
        """The position of the best chain after a layer was appended: behind its nearest use of that layer."""
        uses = [i for i, used in enumerate(best) if used == layer]
        if uses:
            return min(uses, key=lambda i: abs(i - position)) + 1
        return next((i for i in range(position, len(best)) if best[i] > layer), len(best))

    def bound(node, action):
        child = node.children.get(action)
        mean = child.value / child.visits if child else node.value / node.visits
        return mean + exploration * node.prior[action] * math.sqrt(node.visits) / (1 + (child.visits if child else 0))

    def simulate():
        """One walk from the root: the nodes on its way, and the complete chain."""
        node, path, prefix, position = root, [root], [], 0
        while True:
            if node is not None and node.visits:  # selection, and expansion by the last node that it comes to
                node.prior = node.prior or policy(prefix, position)
                still_open = [a for a in node.prior if a not in node.children or not node.children[a].closed]
                action = max(still_open, key=lambda a: bound(node, a))
                node = node.children.setdefault(action, Node())
                path.append(node)
            else:  # rollout
                node, weights = None, policy(prefix, position)
                action = rng.choices(list(weights), weights.values())[0]
            if action == STOP:
                return path, tuple(prefix)
            prefix.append(action)
            position = follow(action, position)

    def back_up(path, chain):
        for node in path:
            node.value += result.reward(chain)

    while len(result.evaluated) < simulations and not root.closed:
        pending, room = {}, min(batch, simulations - len(result.evaluated))  # {chain: the walks that led to it}
        for _ in range(4 * batch):  # several walks may lead to one chain
            path, chain = simulate()
            for node in path:
                node.visits += 1
            if len(path) == len(chain) + 2:  # the walk ended inside the tree: root, each layer, STOP
                path[-1].closed = True
                for node in reversed(path[:-1]):
                    node.closed = all(a in node.children and node.children[a].closed for a in node.prior)
            if chain in result.evaluated:
                back_up(path, chain)
            else:
                pending.setdefault(chain, []).append(path)
            if root.closed or len(pending) == room:
                break
        if not pending:
            continue
        result.evaluated.update(zip(pending, score([*pending]), strict=True))
        for chain, paths in pending.items():
            for path in paths:
                back_up(path, chain)
        right = [chain for chain in pending if result.evaluated[chain] > 0]
        if right:
            newest = max(right, key=result.reward)  # of equals the newest, so that the search drifts along a plateau
            if not result.evaluated[best] > 0 or result.reward(newest) >= result.reward(best):
                best, root = newest, Node()  # the default policy changes, and the priors with it
    return result
