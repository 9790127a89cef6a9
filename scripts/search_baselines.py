"""Four searches to measure `mcts.search` against, on chains of the same length at most and with the same budget.

Each takes (score, n_layers, budget, seed) and returns {chain: correct} for every distinct chain that it evaluated, the
full-depth chain first. None evaluates more distinct chains than the budget. The two tree searches count a chain seen
before as a simulation, as the paper does, and so evaluate fewer; hill_climb gives up after 20 proposals a chain.

  edit_mcts      the protocol of the CoLa paper (arXiv 2507.07996): the root is the full-depth chain, an action skips a
                 block of 1-4 layers or repeats one, UCB with c = 1.8, a length penalty of 3.0 * depth / n_layers inside
                 the UCB score, a random child with probability 0.1. Textbook UCT otherwise.
  leaf_mcts      the same, but it descends to a leaf before it expands: no node ever gets a second child, so the tree
                 is a path.
  hill_climb     keeps the shortest right chain so far and changes one or two random blocks of it.
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
            self.seen[chain] = bool(self.score([chain])[0])
        return self.seen[chain]


def _spend(propose, score, n_layers, budget, seed):
    evaluate = _Budget(score, n_layers, budget)
    try:
        propose(evaluate, n_layers, random.Random(seed), budget)
    except _Spent:
        pass
    return evaluate.seen


def edit_mcts(score, n_layers, budget=200, seed=0, c=1.8, length_penalty=3.0, random_child=0.1, leaf_only=False):
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
            while node.children and (leaf_only or not node.untried):
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


def leaf_mcts(score, n_layers, budget=200, seed=0):
    return edit_mcts(score, n_layers, budget, seed, leaf_only=True)


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
