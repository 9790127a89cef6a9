"""Searches to measure `mcts.search` against, on chains of at most the same length and with the same budget.

Each takes (score, n_layers, budget, seed), where `score` is `Verifier.score`, and returns {chain: correct} for every
distinct chain that it evaluated, the full-depth chain first. None evaluates more distinct chains than the budget.
edit_mcts counts a chain seen before as a simulation, as the paper does, and so evaluates fewer; hill_climb gives up
after 20 proposals a chain. guided_search scores 16 chains at a time, the others one. follow_best.py holds one more.

  guided_search  evolution: parents are, for each depth, the correct or else most promising chain so far; a child
                 follows its parent from the first layer and leaves it now and then to skip, loop or stop.
  edit_mcts      the protocol of the CoLa paper (arXiv 2507.07996): the root is the full-depth chain, an action skips a
                 block of 1-4 layers or repeats one, UCB with c = 1.8, a length penalty of 3.0 * depth / n_layers inside
                 the UCB score, a random child with probability 0.1. Textbook UCT otherwise.
  released_mcts  the search that the authors of CoLa released in 2026 (github.com/tianyi-lab/PoLar, commit c86d76e),
                 without its bounds on the length: a leaf gets all its children at once, one of which is evaluated;
                 blocks of more than one layer at the root only, each layer at most twice, UCB with c = sqrt(2), a
                 length penalty of 5. A child not yet evaluated is only reached at random.
  hill_climb     keeps the shortest correct chain so far and changes one or two random blocks of it.
  random_chains  walks the layers in order and jumps by -4..+4 with probability 0.1 at each step.
"""
import math
import random


class _Spent(Exception):
    pass


class _Budget:
    def __init__(self, score, n_layers, budget):
        self.score, self.budget, self.seen = score, budget, {}
        self(tuple(range(n_layers)))

    def __call__(self, chain):
        if chain not in self.seen:
            if len(self.seen) >= self.budget:
                raise _Spent
            self.seen[chain] = self.score([chain])[0][0]
        return self.seen[chain]


def _spend(propose, score, n_layers, budget, seed):
    evaluate = _Budget(score, n_layers, budget)
    try:
        propose(evaluate, n_layers, random.Random(seed), budget)
    except _Spent:
        pass
    return evaluate.seen


def guided_search(score, n_layers, budget=200, seed=0, batch=16):
    rng, full = random.Random(seed), tuple(range(n_layers))
    scores = {full: score([full])[0]}  # {chain: (correct, promise)}
    while len(scores) < budget:
        shortest = min((len(chain) for chain, (correct, _) in scores.items() if correct), default=None)
        if shortest is None:
            parents = sorted(scores, key=lambda chain: -scores[chain][1])[:8]
            weights = [0.5 ** rank for rank in range(len(parents))]
        else:
            top = {}  # {depth: chain}
            for chain in scores:
                if len(chain) <= shortest and scores[chain] > scores.get(top.get(len(chain)), (False, -math.inf)):
                    top[len(chain)] = chain
            parents = [*top.values()]
            weights = [1.0 if scores[chain][0] else math.exp(3 * scores[chain][1]) for chain in parents]
        children, limit = {}, 2 * n_layers if shortest is None else shortest - 1
        for attempt in range(2000):
            leave, loop = min(0.5, 1.6 * (1 + attempt / 200) / n_layers), 0.5 if shortest is None else 0.25
            child = _child(rng.choices(parents, weights)[0], n_layers, rng, leave, loop)
            if len(child) <= limit and child not in scores:
                children[child] = None
            if len(children) == min(batch, budget - len(scores)):
                break
        if not children:
            break
        scores |= zip(children, score([*children]))
    return {chain: correct for chain, (correct, _) in scores.items()}


def _child(parent, n_layers, rng, leave, loop):
    """A chain that follows its parent, but leaves it with probability `leave` at a step, to loop with share `loop`."""
    chain, position = [], 0
    while len(chain) <= 2 * n_layers:
        last, follow = chain[-1] if chain else -1, parent[position] if position < len(parent) else n_layers
        layer = follow
        if rng.random() < leave:
            window = range(max(0, last - 3), last + 1) if rng.random() < loop else range(last + 1, n_layers + 1)
            others = [layer for layer in window if layer != follow] or [follow]
            layer = rng.choices(others, [1 / max(1, abs(follow - layer)) for layer in others])[0]
        if layer == n_layers:
            break
        chain.append(layer)
        after = [i + 1 for i, used in enumerate(parent) if used == layer]
        after = after or [i for i, used in enumerate(parent) if used > layer and (i == 0 or parent[i - 1] < layer)]
        position = min(after or [len(parent)], key=lambda end: abs(end - 1 - position))
    return tuple(chain)


def edit_mcts(score, n_layers, budget=200, seed=0, c=1.8, length_penalty=3.0, random_child=0.1):
    class Node:
        def __init__(self, chain, parent, rng):
            self.chain, self.parent, self.children, self.visits, self.value = chain, parent, [], 0, 0.0
            n = len(chain)
            self.untried = [chain[:i] + chain[i + k:] for i in range(n) for k in (1, 2, 3, 4) if i + k <= n and n > k]
            self.untried += [chain[:i + k] + chain[i:] for i in range(n) for k in (1, 2, 3, 4)
                             if i + k <= n and n + k <= 2 * n_layers]
            rng.shuffle(self.untried)

    def propose(evaluate, n_layers, rng, budget):
        root = Node(tuple(range(n_layers)), None, rng)
        for t in range(1, budget + 1):  # the paper counts simulations, repeated chains included
            node = root
            while node.children and not node.untried:
                if rng.random() < random_child:
                    node = rng.choice(node.children)
                else:
                    node = max(node.children, key=lambda k: math.inf if not k.visits else
                               k.value / k.visits + c * math.sqrt(math.log(t) / k.visits)
                               - length_penalty * len(k.chain) / n_layers)
            if node.untried and node.visits:
                node.children.append(Node(node.untried.pop(), node, rng))
                node = node.children[-1]
            reward = float(evaluate(node.chain))
            while node:
                node.visits, node.value, node = node.visits + 1, node.value + reward, node.parent

    return _spend(propose, score, n_layers, budget, seed)


def released_mcts(score, n_layers, budget=200, seed=0, c=math.sqrt(2), length_penalty=5.0, random_child=0.1):
    class Node:
        def __init__(self, chain, parent):
            self.chain, self.parent, self.children, self.visits, self.value = chain, parent, [], 0, 0.0
            self.bound, self.closed = -math.inf, False

    def edits(chain, sizes):
        for i in range(len(chain)):
            for k in sizes:
                if i + k <= len(chain):
                    yield chain[:i] + chain[i + k:]
                    if all(chain.count(layer) < 2 for layer in chain[i:i + k]) and len(chain) + k <= 2 * n_layers:
                        yield chain[:i + k] + chain[i:]

    def propose(evaluate, n_layers, rng, budget):
        root = Node(tuple(range(n_layers)), None)
        known = {root.chain, ()}
        while not root.closed:
            node = root
            while open_children := [child for child in node.children if not child.closed]:
                node = (rng.choice(open_children) if rng.random() < random_child else
                        max(open_children, key=lambda child: child.bound))
            for chain in edits(node.chain, (1, 2, 3, 4) if node is root else (1,)):
                if chain not in known:
                    known.add(chain)
                    node.children.append(Node(chain, node))
            node.closed = not node.children
            node = rng.choice(node.children or [node])
            reward = float(evaluate(node.chain))
            while node:
                node.visits, node.value = node.visits + 1, node.value + reward
                node.bound = (node.value / node.visits - length_penalty * len(node.chain) / n_layers
                              + c * math.sqrt(math.log(root.visits + 1) / node.visits))
                node.closed = node.closed or bool(node.children) and all(child.closed for child in node.children)
                node = node.parent

    return _spend(propose, score, n_layers, budget, seed)


def hill_climb(score, n_layers, budget=200, seed=0):
    def propose(evaluate, n_layers, rng, budget):
        best = tuple(range(n_layers))
        correct = evaluate(best)
        for _ in range(20 * budget):
            chain = best
            for _ in range(1 + (rng.random() < 0.5) + (0 if correct else rng.randint(0, 2))):
                i, k = rng.randrange(len(chain)), rng.randint(1, 4)
                if rng.random() < (0.75 if correct else 0.5) and len(chain) > k:
                    chain = chain[:i] + chain[i + k:]
                elif len(chain) + k <= 2 * n_layers:
                    chain = chain[:i + k] + chain[i:]
            if evaluate(chain) and (not correct or len(chain) <= len(best)):
                best, correct = chain, True

    return _spend(propose, score, n_layers, budget, seed)


def random_chains(score, n_layers, budget=200, seed=0):
    def propose(evaluate, n_layers, rng, budget):
        for _ in range(20 * budget):
            chain, layer = [], 0
            while layer < n_layers and len(chain) < 2 * n_layers:
                chain.append(layer)
                layer = max(0, layer + 1 + (rng.choice([-4, -3, -2, -1, 1, 2, 3, 4]) if rng.random() < 0.1 else 0))
            evaluate(tuple(chain))

    return _spend(propose, score, n_layers, budget, seed)
