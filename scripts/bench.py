"""The price of one evaluated chain, four ways, in one run on one machine.

    python -m scripts.bench
    python -m scripts.bench --model path/to/checkpoint --arc path/to/arc_easy.jsonl

  (a) `generate` of transformers, greedy, on a ModuleList of the chain's layers with a cache slot for each step
  (b) `Llama.generate`
  (c) `Verifier`, one chain at a time, nothing kept from chain to chain
  (d) a whole search, `mcts.search` on one `Verifier`: the time of both, divided by the chains evaluated

(d) comes first; (a), (b) and (c) then run a random subset of its chains, and the verdicts are compared. The empty chain
counts in none of the four, because transformers cannot cache it.

Last, the search of `python cola.py --sample-id 12`, alone and beside two busy processes a core.
"""
import argparse
import copy
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import cola
import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm

import data
import mcts
from model import Verifier, fetch

try:
    import transformers
    transformers.logging.disable_progress_bar()
except ImportError:
    transformers = None

SAMPLES = (0, 2, 4)  # of each dataset; in arithmetic they are of levels 1, 3 and 5


def load_reference(folder, weight):
    """The checkpoint in transformers, as a function from a chain to the model that runs it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=weight.dtype).to(weight.device).eval()
    config, layers, types = model.config, model.model.layers, getattr(model.config, "layer_types", None)

    def with_chain(chain):
        steps = [copy.copy(layers[i]) for i in chain]  # the weights stay shared
        for i, step in enumerate(steps):
            step._modules = step._modules | {"self_attn": copy.copy(step.self_attn)}  # copy.copy shares the dict
            step.self_attn.layer_idx = i  # the cache's slot
        model.model.layers, config.num_hidden_layers = torch.nn.ModuleList(steps), len(chain)
        if types:
            config.layer_types = [types[i] for i in chain]
        return model
    return with_chain


def one_by_one(sample, reference):
    """(a), (b) and (c), each as a function from a chain to its verdict."""
    model, prompt, stop = sample.model, sample.prompt, sample.stop
    limit = len(sample.target) + (stop is not None)  # enough tokens to tell whether the answer is correct
    tokens = torch.tensor([prompt], device=model.lm_head.weight.device)
    alone = Verifier(model, prompt, sample.target, stop, 0, sample.fused)
    ends = sorted({*(stop or ()), *sample.ends}) or None

    def correct(new):
        ended = stop is None or len(new) < limit or new[-1] in sample.ends
        return ended and data.exact_match(sample.read(new), sample.problem.answer)

    def transformers_generate(chain):
        new = reference(chain).generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, use_cache=True,
                                        max_new_tokens=limit, eos_token_id=ends, pad_token_id=0)
        new = new[0, len(prompt):].tolist()
        return correct(new[:-1] if stop and new[-1] in stop else new)

    ways = {"a": transformers_generate} if reference else {}
    return ways | {"b": lambda chain: correct(model.generate(prompt, chain, limit, stop, sample.ends)),
                   "c": lambda chain: alone([chain])[0]}


def ideal_seconds(model, length, calls):
    """What the products of all layer steps would take at the speed of one plain product of their mean shape.

    Counts linear layers and causal attention. `calls` lists (layer, batch); a step is one layer on `length` tokens.
    """
    config, like, steps = model.config, model.lm_head.weight, sum(batch for _, batch in calls)
    work = 2 * config.num_attention_heads * config.head_dim * length * (length + 1) * steps
    for layer, batch in calls:
        for name, weight in layer.named_parameters():
            if weight.ndim == 2:
                share = config.num_experts_per_tok / len(layer.mlp.experts) if ".experts." in name else 1
                work += 2 * weight.numel() * share * batch * length
    x = torch.randn(round(length * steps / len(calls)), config.hidden_size, dtype=like.dtype, device=like.device)
    w = torch.randn(config.hidden_size, config.intermediate_size, dtype=like.dtype, device=like.device)
    timer = Timer("torch.mm(x, w, out=y)", globals={"torch": torch, "x": x, "w": w, "y": x @ w},
                  num_threads=torch.get_num_threads())
    return work / (2 * len(x) * w.numel()) * timer.blocked_autorange(min_run_time=0.5).median


def bench(sample, reference, args, bar, total):
    """Measures one sample and adds to the case's `total`; returns a line for each chain whose verdicts differ."""
    model, verify = sample.model, sample.verify
    calls = []  # (layer, batch)

    def score(chains):
        begun = time.perf_counter()
        scores = verify.score(chains)
        total["inside"] += time.perf_counter() - begun
        bar.update(len(chains))
        return scores

    warm_up = Verifier(model, sample.prompt, sample.target, sample.stop, fused=sample.fused)
    mcts.search(warm_up.score, len(model.layers), 1 + args.batch, batch=args.batch, departures=warm_up.departures())
    start = time.perf_counter()
    departures = verify.departures()
    estimate = time.perf_counter() - start
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: calls.append((layer, len(inputs[0]))))
             for layer in model.layers]
    start = time.perf_counter()
    verdicts = {"d": cola.search(args, score, len(model.layers), args.seed, lambda: departures).evaluated}
    total["d"] += time.perf_counter() - start + estimate
    total["estimate"] += estimate
    for hook in hooks:
        hook.remove()
    length, chains = len(sample.prompt + sample.target), [chain for chain in verdicts["d"] if chain]
    correct, ideal = sum(verdicts["d"][chain] for chain in chains), ideal_seconds(model, length, calls)
    total.update(chains=len(chains), correct=correct, tokens=length, run=verify.steps_run, asked=verify.steps_asked,
                 calls=len(calls), ideal=ideal)

    chains = random.Random(args.seed).sample(chains, min(args.subset, len(chains)))
    for way, evaluate in one_by_one(sample, reference).items():
        evaluate(chains[0])  # warm up
        start = time.perf_counter()
        verdicts[way] = {chain: evaluate(chain) for chain in chains}
        total[way] += time.perf_counter() - start
        bar.update(len(chains))
    differ = [chain for chain in chains if len({verdicts[way][chain] for way in verdicts}) > 1]
    total.update(subset=len(chains), differ=len(differ))
    return [f"- {sample.problem.id}, chain {cola.format_chain(chain)}: correct only by "
            + ", ".join(f"({way})" for way in sorted(verdicts) if verdicts[way][chain]) for chain in differ]


def row(label, total):
    """The table's line on a case."""
    price = {way: 1000 * total[way] / total["chains" if way == "d" else "subset"] for way in "abcd" if total[way]}
    cells = [label, f"{total['tokens'] / len(SAMPLES):.0f}", f"{total['chains']}, {total['correct']} correct",
             *(f"{price[way]:.3g}" if way in price else "-" for way in "abcd"),
             ", ".join(f"{price[way] / price['d']:.1f}" for way in "abc" if way in price),
             f"{total['run'] / total['asked']:.0%}", f"{total['run'] / total['calls']:.1f}",
             f"{1 - (total['inside'] + total['estimate']) / total['d']:.1%}", f"{total['ideal'] / total['inside']:.0%}",
             f"{total['differ']} of {total['subset']}"]
    return f"| {' | '.join(cells)} |"


# Works until its standard input closes, which a parent that was killed does too.
BUSY = "import os, sys, threading as t; t.Thread(target=lambda: (sys.stdin.read(), os._exit(0))).start()\nwhile 1: pass"


@contextmanager
def busy(count):
    """That many busy processes run in the meantime."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE) for _ in range(count)]
    try:
        time.sleep(1)
        yield
    finally:
        for process in processes:
            process.stdin.close()
            process.wait()


def first_command(times=5):
    """The median time of the search of `python cola.py --sample-id 12`, in seconds."""
    seconds = []
    for _ in range(times):
        printed = subprocess.check_output([sys.executable, cola.__file__, "--sample-id", "12"], text=True)
        chains, rate = re.search(r"(\d+) chains evaluated.* ([\d.]+) chains/s", printed).groups()
        seconds.append(int(chains) / float(rate))
    return statistics.median(seconds)


def main(args):
    lines, unlike, threads = [], [], []
    for name in args.models:
        args.model = name
        model, tokenizer = cola.load_checkpoint(args)
        weight = model.lm_head.weight
        threads.append(f"{torch.get_num_threads()} on {Path(name).name}")
        folder = cola.TINY if name == "tiny" else fetch(name, args.revision)
        reference = transformers and load_reference(folder, weight)
        for dataset, shots in [("arithmetic", 0)] if name == "tiny" else [(args.arc, 0), ("arithmetic-1", 2)]:
            label, problems = f"{Path(name).name}, {Path(dataset).stem}, {shots} shots", data.load(dataset, shots)
            total, todo = Counter(), len(SAMPLES) * (args.simulations + (3 if reference else 2) * args.subset)
            with tqdm(total=todo, desc=label, unit="chain", disable=None) as bar:
                for i in SAMPLES:
                    sample = cola.Sample(model, tokenizer, problems[i], args.cache_mb)
                    unlike += bench(sample, reference, args, bar, total)
            lines.append(row(label, total))

    print(f"torch {torch.__version__}, threads: {', '.join(threads)}, {weight.device}, {weight.dtype};",
          f"transformers {transformers.__version__};" if transformers else "no (a), as transformers is not installed;",
          f"(a), (b), (c) on {args.subset} random chains a sample of those of (d)\n")
    print("| case | tokens | chains | (a) ms | (b) ms | (c) ms | (d) ms | a/d, b/d, c/d | steps run | mean batch "
          "| outside verifier | of GEMM rate | verdicts differ |")
    print("|---|" + "---:|" * 12, *lines, *(["", *unlike] if unlike else []), sep="\n")
    alone, count = first_command(), 2 * (os.cpu_count() or 1)
    with busy(count):
        beside = first_command()
    print(f"\npython cola.py --sample-id 12 searches in {alone:.2f} s, beside {count} busy processes on "
          f"{os.cpu_count()} cores in {beside:.2f} s: {beside / alone:.1f} times as long")


def parser():
    p = cola.Parser("python -m scripts.bench", __doc__, usage="%(prog)s [options]", conflict_handler="resolve")
    cola.add_model_arguments(p)
    cola.add_search_arguments(p)
    p.add_argument("--no-chat", action="store_true", default=True, help=argparse.SUPPRESS)  # all in plain form
    bench = p.add_argument_group("bench")
    bench.add_argument("--model", dest="models", action="append", default=["tiny"], metavar="NAME",
                       help="a checkpoint to measure besides tiny")
    bench.add_argument("--arc", default="arc-easy", metavar="NAME",
                       help="a dataset for it besides arithmetic-1 (default: %(default)s)")
    bench.add_argument("--subset", type=cola.at_least(1), default=32, metavar="N",
                       help="chains a sample for (a), (b) and (c) (default: %(default)s)")
    return p


if __name__ == "__main__":
    cola.exit_on_error("bench", main, parser().parse_args())
