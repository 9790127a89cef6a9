"""Draws what studies found: layer_use.png and budget.png.

    pip install -r scripts/requirements.txt
    python -m scripts.figures runs/*.jsonl --out results

layer_use: a panel per model. How often the best chains skip each layer (blue) and loop it (orange), for samples that
  the full model answers correctly (solid) and for those that only a chain does (dashed). Bands are 95 % intervals.
budget: a panel per model, a curve per study: of the samples that the full model answers wrongly, the share that is
  corrected (solid) and the share whose decoy is reached (dashed), against the number of chains evaluated.
"""
from itertools import cycle
from pathlib import Path

import cola
from scripts import common

try:
    from matplotlib import pyplot
except ImportError:
    pyplot = None

WIDTH, DPI = 9, 100  # inches, and dots per inch: 900 dots, about what a README shows without scaling
BLUE, ORANGE = "#0072b2", "#e69f00"


def parser():
    p = cola.Parser("python -m scripts.figures", __doc__)
    p.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what scripts.study wrote, .jsonl or .jsonl.gz")
    p.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="folder for the figures (default: here)")
    return p


def panels_by_model(studies, height):
    """A figure with a panel for each model: (figure, [(panel, model, {task: lines})])."""
    models = {}
    for title, lines in studies.items():
        model, _, task = title.partition(", ")
        models.setdefault(model, {})[task] = lines
    figure, panels = pyplot.subplots(1, len(models), figsize=(WIDTH, height), squeeze=False, layout="constrained")
    return figure, [(panel, model, models[model]) for panel, model in zip(panels.flat, models)]


def layer_use(studies):
    figure, panels = panels_by_model(studies, 3)
    for panel, model, tasks in panels:
        lines = [line for task in tasks.values() for line in task if line["best"] is not None]
        layers = range(lines[0]["n_layers"] if lines else 0)
        counts = []
        for kind, style in (("correct", "-"), ("corrected", "--")):
            chains = [line["best"] for line in lines if bool(line["initial_score"]) == (kind == "correct")]
            counts.append(f"{len(chains)} {kind}")
            for verb, color, times in (("skip", BLUE, (0,)), ("loop", ORANGE, range(2, 99))):
                hits = [sum(chain.count(layer) in times for chain in chains) for layer in layers]
                if chains:
                    panel.plot(layers, [hit / len(chains) for hit in hits], style, color=color, linewidth=1.2,
                               label=f"{verb}, {kind} samples")
                    panel.fill_between(layers, *zip(*(common.wilson(hit, len(chains)) for hit in hits)), color=color,
                                       alpha=0.15, linewidth=0)
        panel.locator_params("x", nbins=6, integer=True)
        panel.set(title=f"{model}\n{', '.join(counts)}", xlabel="layer", ylim=(0, 1))
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.supylabel("share of best chains")
    return figure


def budget(studies):
    figure, panels = panels_by_model(studies, 4)
    for panel, model, tasks in panels:
        for color, (task, lines) in zip(cycle(pyplot.colormaps["tab10"].colors), tasks.items()):
            # Studies made before these fields were recorded have no curve.
            wrong = [line for line in lines if not line["initial_score"] and line["decoy"] and "found_at" in line]
            budgets = range(1, max((line["settings"]["simulations"] for line in lines), default=1) + 1)
            corrected = [line["found_at"] for line in wrong if line["found_at"]]
            decoys = [line["decoy"]["found_at"] for line in wrong if line["decoy"]["found_at"]]
            for found, style, label in ((corrected, "-", f"{task} ({len(wrong)})"), (decoys, "--", None)):
                shares = [sum(at <= chains for at in found) / max(1, len(wrong)) for chains in budgets]
                panel.plot(budgets, shares, style, color=color, linewidth=1.2, label=label)
        panel.set(title=model, xlabel="chains evaluated", ylim=(0, 1))
        panel.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    figure.supylabel("share of wrong samples")
    return figure


def main(args):
    if pyplot is None:
        raise ValueError("matplotlib is missing; pip install -r scripts/requirements.txt")
    pyplot.rcParams |= {"font.size": 8, "axes.titlesize": 8, "figure.labelsize": 8, "axes.spines.top": False,
                        "axes.spines.right": False}
    studies = common.studies(args.files)
    args.out.mkdir(parents=True, exist_ok=True)
    for draw in (layer_use, budget):
        file = args.out / f"{draw.__name__}.png"
        draw(studies).savefig(file, dpi=DPI)
        print(file)


if __name__ == "__main__":
    cola.exit_on_error("figures", main, parser().parse_args())
