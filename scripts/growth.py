"""How the price of an evaluated chain grows with the prompt, the depth of the model and the number of simulations.

    python -m scripts.growth

Each row is one search on a Llama of width 256 with random weights: 16 layers, a prompt of 64 tokens and 200 simulations
but for the figure that the row names. The last rows search with tiny instead, on sample 12 of arithmetic. Figures are
medians over --repeats searches; on another machine only their ratios are comparable.
"""
import statistics
import time

import cola
import torch
from tqdm import tqdm

import data
import mcts
from model import Config, Llama, Verifier

LENGTHS, DEPTHS, SIMULATIONS = (16, 32, 64, 128, 256, 512), (8, 16, 32, 64), (50, 200, 800, 3200)


def parser():
    p = cola.Parser("python -m scripts.growth", __doc__)
    p.add_argument("--repeats", type=cola.at_least(1), default=3, metavar="N",
                   help="searches for each figure (default: %(default)s)")
    return p


def random_case(length=64, n_layers=16):
    """A model with random weights, a prompt of `length` tokens and an answer of 4."""
    torch.manual_seed(0)
    model = Llama(Config(vocab_size=1000, hidden_size=256, intermediate_size=768, num_hidden_layers=n_layers,
                         num_attention_heads=4, rms_norm_eps=1e-5)).eval()
    tokens = torch.randint(1000, (length + 4,)).tolist()
    return model, tokens[:length], tokens[length:]


def tiny_case():
    model, tokenizer = cola.load_checkpoint(cola.parser().parse_args(["--sample-id", "12"]))
    return model, *tokenizer.encode(data.load("arithmetic")[12]), tokenizer.stop


def measure(case, simulations, seed):
    """Milliseconds per chain of one search, and how many of them pass outside the verifier."""
    verifier, n_layers = Verifier(*case), len(case[0].layers)

    def score(chains):
        nonlocal inside
        start = time.perf_counter()
        scores = verifier.score(chains)
        inside += time.perf_counter() - start
        return scores

    start = time.perf_counter()
    departures = verifier.departures()
    inside = time.perf_counter() - start
    chains = len(mcts.search(score, n_layers, simulations, seed, departures=departures).evaluated)
    seconds = time.perf_counter() - start
    return 1000 * seconds / chains, 1000 * (seconds - inside) / chains


def main(args):
    cases = [(f"prompt of {length} tokens", random_case(length), 200) for length in LENGTHS]
    cases += [(f"{n_layers} layers", random_case(n_layers=n_layers), 200) for n_layers in DEPTHS]
    cases += [(f"tiny, {simulations} simulations", tiny_case(), simulations) for simulations in SIMULATIONS]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| | ms per chain | of these outside the verifier |\n|---|---:|---:|")
    for label, case, simulations in tqdm(cases, unit="row", disable=None):
        measure(case, 20, 0)  # warm up
        total, outside = zip(*(measure(case, simulations, seed) for seed in range(args.repeats)))
        tqdm.write(f"| {label} | {statistics.median(total):.3g} | {statistics.median(outside):.3g} |")


if __name__ == "__main__":
    cola.exit_on_error("growth", main, parser().parse_args())
