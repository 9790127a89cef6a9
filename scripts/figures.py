"""Draws what studies found: layer_use.png, depths.png and tradeoff.png.

    pip install -r scripts/requirements.txt
    python -m scripts.figures runs/*.jsonl --out results

layer_use: the share of best chains that have this layer at this position, the dashed line being the full model's;
  towards the right chains have ended, so the columns fade.
depths: how deep the best chains are, by study and level; a sample still wrong keeps the full depth.
tradeoff: what accuracy a mean depth allows to one who knows for each sample which chains are right. A sample takes its
  best chain if the reward 1 - penalty * depth / n_layers is above that of the shortest chain evaluated, wrong though
  that be, and else the latter. Along a curve the penalty rises to the left, as numbered; the square is the full model.
"""
import math
from collections import Counter
from itertools import cycle
from pathlib import Path

import cola
from scripts import common

try:
    from matplotlib import pyplot
    from matplotlib.colors import PowerNorm
except ImportError:
    pyplot = None

WIDTH, DPI = 9, 100  # inches, and dots an inch: 900 dots, about what a README shows without scaling
BLUE, ORANGE, GREY = "#0072b2", "#e69f00", "#bbbbbb"


def parser():
    p = cola.Parser("python -m scripts.figures", __doc__)
    p.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what scripts.study wrote, .jsonl or .jsonl.gz")
    p.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="where to (default: here)")
    return p


def outcome(line):
    """Whether the full model is right on a sample, some chain is, or none."""
    return "right" if line["initial_score"] else "still wrong" if line["best"] is None else "corrected"


def layer_use(studies):
    figure, panels = pyplot.subplots(2, len(studies), figsize=(WIDTH, 5), squeeze=False, layout="constrained")
    for column, (title, lines) in enumerate(studies.items()):
        n_layers = lines[0]["n_layers"]
        positions = max((len(line["best"]) for line in lines if line["best"] is not None), default=n_layers)
        for panel, kind in zip(panels[:, column], ("right", "corrected")):
            chains = [line["best"] for line in lines if outcome(line) == kind]
            used = Counter((layer, position) for chain in chains for position, layer in enumerate(chain))
            shares = [[used[layer, position] / max(1, len(chains)) for position in range(positions)]
                      for layer in range(n_layers)]
            image = panel.imshow(shares, norm=PowerNorm(0.5, 0, 1), cmap="Blues", origin="lower", aspect="auto",
                                 interpolation="nearest")  # the norm: most shares are small
            panel.plot([0, n_layers - 1], [0, n_layers - 1], "--", color=ORANGE, linewidth=1)
            panel.locator_params(nbins=6, integer=True)
            panel.set_title(title.replace(", ", "\n") + f"\n{len(chains)} samples {kind}")
            if not chains:
                panel.set_axis_off()
    figure.supxlabel("position in the chain")
    figure.supylabel("layer")
    figure.colorbar(image, ax=panels, label="share of best chains")
    return figure


def depths(studies):
    """A panel for each level of each study."""
    groups = {}
    for title, lines in studies.items():
        for line in lines:
            name = title if line["level"] is None else f"{title}, level {line['level']}"
            groups.setdefault(name, []).append(line)
    columns, height = min(5, len(groups)), math.ceil(len(groups) / 5)
    figure, panels = pyplot.subplots(height, columns, figsize=(WIDTH, 0.4 + 2.1 * height), squeeze=False,
                                     layout="constrained")
    for panel, (name, lines) in zip(panels.flat, groups.items()):
        full, kinds = lines[0]["n_layers"], {"right": BLUE, "corrected": ORANGE, "still wrong": GREY}
        found = [[full if line["best"] is None else len(line["best"]) for line in lines if outcome(line) == kind]
                 for kind in kinds]
        deepest = max(full, *map(max, filter(None, found)))
        panel.hist(found, bins=[depth - 0.5 for depth in range(deepest + 2)], stacked=True, color=[*kinds.values()],
                   label=[*kinds], rwidth=0.85)
        panel.axvline(full, linestyle="--", color="black", linewidth=1, label="full model", zorder=0)
        panel.locator_params("y", nbins=4, integer=True)
        panel.set(title=name.replace(", ", "\n"), xlabel="depth")
    for panel in panels.flat[len(groups):]:
        panel.set_axis_off()
    figure.supylabel("samples")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def tradeoff(studies):
    figure, panel = pyplot.subplots(figsize=(WIDTH, 4.5), layout="constrained")
    for color, (title, lines) in zip(cycle(pyplot.colormaps["tab10"].colors), studies.items()):
        full, curve = lines[0]["n_layers"], {}
        for penalty in (2 ** (step / 8) for step in range(-8, 49)):
            right, depth = 0, 0
            for line in lines:
                chains, best = line["final_valid_transitions"] + line["final_invalid_transitions"], line["best"]
                shortest = min(map(len, chains))
                keep = best is not None and 1 - penalty * len(best) / full > -penalty * shortest / full
                right, depth = right + keep, depth + (len(best) if keep else shortest)
            curve[penalty] = 100 * depth / full / len(lines), 100 * right / len(lines)
        panel.plot(*zip(*curve.values()), color=color, label=title)
        for penalty in (1, 2):
            panel.plot(*curve[penalty], "o", color=color, markersize=4)
            panel.annotate(penalty, curve[penalty], (-9, 4), textcoords="offset points", color=color)
        of_full = 100, 100 * sum(line["initial_score"] for line in lines) / len(lines)
        panel.plot(*zip(curve[0.5], of_full), "s:", color=color, linewidth=1, markevery=[1])
    panel.set(xlabel="mean depth, % of the layers", ylabel="accuracy, %", xlim=(0, None), ylim=(0, 103))
    panel.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def main(args):
    if pyplot is None:
        raise ValueError("matplotlib is missing; pip install -r scripts/requirements.txt")
    pyplot.rcParams |= {"font.size": 8, "axes.titlesize": 8, "figure.labelsize": 8, "axes.spines.top": False,
                        "axes.spines.right": False}
    studies = common.studies(args.files)
    args.out.mkdir(parents=True, exist_ok=True)
    for draw in (layer_use, depths, tradeoff):
        file = args.out / f"{draw.__name__}.png"
        draw(studies).savefig(file, dpi=DPI)
        print(file)


if __name__ == "__main__":
    cola.exit_on_error("figures", main, parser().parse_args())
