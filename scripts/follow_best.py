"""A search to measure `mcts.search` against: the one it replaced. UCT over append/stop that sees no promise.

Its policy follows one chain, the shortest correct one so far (the full-depth chain until there is one), leaves it now
and then to skip, loop or stop, and resumes where it meets the chain again. Each new best chain starts a new tree.
"""
import math
import random

LEAVE = 1.6  # how often a walk leaves the chain that it follows, in n_layers steps
LOOP, EARLY_LOOP = 0.25, 0.65  # share of these that loops, once a chain is correct and before
TRIES, WIDEN, MATURE, EXPLORATION, PENALTY, MAX_LOOP = 10, 1.2, 8, 8.0, 0.2, 4


class Node:
    def __init__(self):
        self.children, self.visits, self.value, self.closed = {}, 0, 0.0, False


class Walks:
    """The walks around one chain; a position is the index in it of the layer that comes next."""

    def __init__(self, chain, n_layers, rng, loop, limit):
        self.chain, self.n_layers, self.rng, self.loop, self.limit = chain, n_layers, rng, loop, limit
        self.root, self.policies, self.ends = Node(), {}, []
        for layer in range(n_layers):
            after_use = [i + 1 for i, used in enumerate(chain) if used == layer]
            after_skip = [i for i, used in enumerate(chain) if used > layer and (i == 0 or chain[i - 1] < layer)]
            self.ends.append(after_use or after_skip or [len(chain)])

    def policy(self, prefix, position, leave):
        """{action: probability}; n_layers stops."""
        last = prefix[-1] if prefix else -1
        follow = self.chain[position] if position < len(self.chain) else self.n_layers
        if (last, follow, leave) not in self.policies:
            actions = range(max(0, last + 1 - MAX_LOOP), self.n_layers + 1)
            policy = dict.fromkeys(actions, 0.0)
            for share, side in ((self.loop, [a for a in actions if a < follow]),
                                (1 - self.loop, [a for a in actions if a > follow])):
                total = sum(1 / abs(a - follow) for a in side)
                policy |= {a: leave * share / abs(a - follow) / total for a in side}
            policy[follow] = 1 - sum(policy.values())
            self.policies[last, follow, leave] = policy
        return self.policies[last, follow, leave]

    def step(self, prefix, position, action):
        """The prefix and the position after an action; the position after stopping is None."""
        if action == self.n_layers:
            return prefix, None
        return [*prefix, action], min(self.ends[action], key=lambda end: abs(end - 1 - position))

    def select(self, node, policy):
        """The open action of highest upper confidence bound, or None."""
        def bound(action):
            child, width = node.children.get(action), EXPLORATION * math.sqrt(node.visits) * policy[action]
            return node.value / node.visits + width if child is None else child.value / child.visits + width / (
                1 + child.visits)
        return max((action for action in policy if action not in node.children or not node.children[action].closed),
                   key=bound, default=None)

    def simulate(self, known, leave):
        """The nodes on the way of one walk, and a new chain or None."""
        node, path, prefix, position, usual = self.root, [self.root], [], 0, min(0.5, LEAVE / self.n_layers)
        while node.visits >= MATURE:
            action = self.select(node, self.policy(prefix, position, usual))
            if action is None:
                node.closed = True
                return path, None
            node = node.children.setdefault(action, Node())
            path.append(node)
            prefix, position = self.step(prefix, position, action)
            if position is None or len(prefix) >= self.limit:
                node.closed = True
                new = tuple(prefix)
                return path, None if any(new in chains for chains in known) or len(new) > self.limit else new
        for _ in range(TRIES):
            new, at = prefix, position
            while at is not None and len(new) <= self.limit:
                policy = self.policy(new, at, leave)
                new, at = self.step(new, at, self.rng.choices([*policy], [*policy.values()])[0])
            new = tuple(new)
            if len(new) <= self.limit and not any(new in chains for chains in known):
                return path, new
        return path, None


def follow_best(score, n_layers, budget=200, seed=0, batch=16):
    """{chain: correct} of the chains evaluated; `score` is `Verifier.score`, of which it uses the first members."""
    rng, full, best = random.Random(seed), tuple(range(n_layers)), None
    evaluated = {full: score([full])[0][0]}
    walks = Walks(full, n_layers, rng, EARLY_LOOP, 2 * n_layers)
    if evaluated[full]:
        best, walks = full, Walks(full, n_layers, rng, LOOP, n_layers)
    while len(evaluated) < budget:
        pending, leave = {}, min(0.5, LEAVE / n_layers)
        for _ in range(20 * batch):
            path, chain = walks.simulate((evaluated, pending), leave)
            for node in path:
                node.visits += 1
                node.value -= PENALTY * walks.limit / n_layers * (chain is None)
            if chain is None:
                leave = min(0.5, leave * WIDEN)
            else:
                pending[chain] = path
            if walks.root.closed or len(pending) == min(batch, budget - len(evaluated)):
                break
        if not pending and walks.root.closed:
            if walks.limit == 2 * n_layers:
                break
            walks.root, walks.limit = Node(), 2 * n_layers
        if pending:
            evaluated |= zip(pending, [correct for correct, _ in score([*pending])])
            for chain, path in pending.items():
                for node in path:
                    node.value += evaluated[chain] - PENALTY * len(chain) / n_layers
            new = min((chain for chain in pending if evaluated[chain]), key=len, default=None)
            if new is not None and (best is None or len(new) <= len(best)):
                best, walks = new, Walks(new, n_layers, rng, LOOP, len(new))
    return evaluated
