"""What several scripts share: their arguments, intervals for their tables, and the lines of a study."""
import glob
import gzip
import json
import math
import os
import sys
import zlib
from tempfile import TemporaryFile

import cola

Z = 1.96  # standard deviations of a normal distribution that hold 95 %


def parser(name, doc, usage="%(prog)s [options]"):
    """A parser with cola.py's arguments for many samples; a script may define any of them anew."""
    p = cola.Parser(f"python -m scripts.{name}", doc, usage=usage, conflict_handler="resolve")
    cola.add_problem_arguments(p)
    cola.add_model_arguments(p)
    cola.add_search_arguments(p)
    return p


def parse_samples(text, count, option="--samples"):
    """"0:250" to a range of sample ids, out of `count`; None to the first 250, or as many as there are.

    Raises ValueError, which names `option`, if the text is malformed or goes beyond them.
    """
    text = text or f"0:{min(250, count)}"
    first, colon, end = text.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise ValueError(f"{option} {text!r} is not FIRST:END with FIRST < END; write 0:{count} for all")
    if int(end) > count:
        raise ValueError(f"{option} {text} goes beyond the {count} samples; give an END of at most {count}")
    return range(int(first), int(end))


def make_folder(path):
    """Makes a folder if need be. Raises OSError if it cannot be written to, so that no long work is lost."""
    path.mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=path).close()


def wilson(hits, total):
    """The 95 % interval of a share."""
    if not total:
        return 0, 1
    middle, width = hits + Z * Z / 2, Z * math.sqrt(hits * (total - hits) / total + Z * Z / 4)
    return (middle - width) / (total + Z * Z), (middle + width) / (total + Z * Z)


def mean(values):
    """A mean with its 95 % interval, as text."""
    if len(values) < 2:
        return "-"
    m = sum(values) / len(values)
    return f"{m:.2f} ± {Z * math.sqrt(sum((x - m) ** 2 for x in values) / (len(values) - 1) / len(values)):.2f}"


def share(flags):
    """A share with its 95 % interval, as text."""
    low, high = wilson(sum(flags), len(flags))
    return f"{sum(flags) / len(flags):.1%} ({low:.0%}-{high:.0%})" if flags else "-"


def lift(pairs):
    """How far the share of the first flags is above that of the second, with its 95 % interval, as text.

    The flags of a pair come from the same sample, so they are correlated: Newcombe, Statistics in Medicine 17 (1998)
    2635-2650, method 10, which combines the two Wilson intervals.
    """
    if not pairs:
        return "-"
    n, both, neither = len(pairs), pairs.count((True, True)), pairs.count((False, False))
    hits = [sum(first for first, _ in pairs), sum(second for _, second in pairs)]
    agreement = both * neither - (hits[0] - both) * (hits[1] - both)
    if agreement > 0:
        agreement = max(0, agreement - n / 2)
    spread = math.sqrt(hits[0] * (n - hits[0]) * hits[1] * (n - hits[1]))
    correlation = agreement / spread if spread else 0
    (p, p_low, p_high), (q, q_low, q_high) = [(hit / n, *wilson(hit, n)) for hit in hits]
    down, up = (math.sqrt(a * a - 2 * correlation * a * b + b * b)
                for a, b in [(p - p_low, q_high - q), (p_high - p, q - q_low)])
    return f"{100 * (p - q):+.1f} points ({round(100 * (p - q - down)):+} to {round(100 * (p - q + up)):+})"


def readable(chain):
    """Whether PoLar can read a chain: blocks of 1 to 4 layers in the model's order, each skipped, run, or run twice."""
    chain, done = tuple(chain), 0  # the layers below `done` are decided
    while chain:
        if chain[0] < done:
            return False
        block = range(chain[0], chain[0] + 4)
        size = next((size for size in range(1, 5) if chain[:2 * size] == 2 * (*block[:size],)), 0)
        done = chain[0] + max(1, size)
        chain = chain[max(1, 2 * size):]
    return True


# The lines of scripts/study.py.

FIELDS = {"sample", "id", "level", "question", "gt_ans", "initial_score", "prediction", "best", "best_prediction",
          "final_valid_transitions", "final_invalid_transitions", "n_layers", "decoy", "reorder", "settings"}
START = b'{"sample": '  # how a line begins
SETTINGS = {"model": str, "dataset": str, "revision": str | None, "shots": int, "split": str | None, "chat": bool}


def files_of(path):
    """A study's file and those that its ranks wrote beside it, if they exist."""
    ranks = path.parent.glob(f"{glob.escape(path.stem)}.rank[0-9]*{glob.escape(path.suffix)}")
    return [file for file in [path, *sorted(ranks)] if file.exists()]


def read_lines(path):
    """The lines of a file, a dict each; it may be compressed. The last one counts once its line feed is there."""
    lines, number = [], 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if text.endswith("\n"):
                    lines.append(json.loads(text))
                    if not (FIELDS <= lines[-1].keys() and all(isinstance(lines[-1]["settings"].get(name, ...), kind)
                                                               for name, kind in SETTINGS.items())):
                        raise ValueError("a field is missing, or of another kind")
    except (ValueError, AttributeError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}, line {number} is not as scripts.study writes it ({error}); give "
                         "another file") from None
    return lines


def studies(paths):
    """The lines of all files, {title of a study: its lines by sample}; a sample with the same result counts once."""
    found = {}
    for path in paths:
        for file in files_of(path) or [path]:
            for line in read_lines(file):
                study = json.dumps(line["settings"], sort_keys=True)
                known = found.setdefault(study, {}).setdefault(line["sample"], line)
                if known["best"] != line["best"]:  # of a fork, say
                    raise ValueError(f"{file}: sample {line['sample']} has another result in a file with the same "
                                     "settings; report them one by one")
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))}: no lines; run python -m scripts.study")
    titled, all_settings = {}, [json.loads(study) for study in found]
    for settings, lines in zip(all_settings, found.values()):
        name = [settings["model"], settings["dataset"].removesuffix(".jsonl")]
        alike = [other for other in all_settings if all(other[key] == settings[key] for key in ("model", "dataset"))]
        name += [f"{key} {value}" for key, value in settings.items() if any(other.get(key) != value for other in alike)]
        titled[", ".join(name)] = [lines[sample] for sample in sorted(lines)]
    return titled


def read_done(out, own, settings):
    """What is done of a study, {sample: line}; raises ValueError if other settings made it.

    Args:
      out: the file given, beside which those of the ranks stand.
      own: the one that this process will append to; an incomplete last line is cut off.
    """
    if own.exists() and not own.is_file():
        raise ValueError(f"{own} is not a file; give another --out")
    done = {}
    for path in files_of(out):
        for line in read_lines(path):
            old = line["settings"]
            changed = [f"{name} {old.get(name)!r}, now {settings.get(name)!r}"
                       for name in settings | old if old.get(name) != settings.get(name)]
            if changed:
                raise ValueError(f"{path} was made with other settings: {'; '.join(changed)}; give another --out")
            done[line["sample"]] = line
    if own.exists():  # and every whole line in it is a study's
        lines, newline, rest = own.read_bytes().rpartition(b"\n")
        if not (rest.startswith(START) or START.startswith(rest)):
            raise ValueError(f"{own} does not end as scripts.study writes it; give another --out")
        if rest:
            print(f"{own}: the last line was incomplete; removed it, its sample runs again", file=sys.stderr)
            os.truncate(own, len(lines + newline))
    return done
