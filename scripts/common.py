"""What several scripts share: their arguments, and intervals for their tables."""
import argparse
import math

import cola

Z = 1.96  # standard deviations of a normal distribution that hold 95 %


def parser(name, doc):
    """A parser with cola.py's arguments for many samples; a script may define any of them anew."""
    p = cola.Parser(prog=f"python -m scripts.{name}", description=doc, conflict_handler="resolve",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    cola.add_arguments(p)
    return p


def parse_samples(text, count):
    """"0:250" to a range of sample ids, out of `count`."""
    first, colon, end = text.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end) <= count):
        raise ValueError(f"samples {text!r} is not FIRST:END with FIRST < END; there are {count} samples, so 0:{count}")
    return range(int(first), int(end))


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
