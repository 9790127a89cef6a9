"""Searches many samples, each with a control, and writes one JSON line a sample.

    python -m scripts.study --out runs/tiny.jsonl
    torchrun --nproc-per-node 8 -m scripts.study --dataset arc-easy --model ORG/NAME --samples 0:500 --out arc.jsonl

Each line is on disk before the next sample begins, and the same command resumes where it was stopped. With several
processes, each takes its share of the samples and writes its own file beside --out, such as arc.rank3.jsonl; they
do not communicate, and their number may change. What a search finds may be luck, so each line has two controls:
  decoy: if the full model is wrong, whether the same search reaches a wrong answer too. It is told how near it comes to
    that answer, just as the search for the correct one is. The decoy is another choice, neither correct nor the full
    model's; or the answer to another problem of the same level, with as many tokens.
  reorder: whether the best chain is correct elsewhere, and whether the full model is: with the choices in another order
    or, for free answers, on the next problems of the same level (skipping those too long for the model).
With --polar the search evaluates only chains that PoLar can read (see scripts.report).

A sample's seed is its id plus --seed. scripts.report and scripts.figures read the lines.
"""
import json
import os
import random
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import cola
import torch
from tqdm import tqdm

import data
from scripts import common


def parser():
    p = common.parser("study", __doc__, usage="%(prog)s --out FILE [options]")
    study = p.add_argument_group("study")
    study.add_argument("--samples", metavar="FIRST:END",
                       help="samples to search (default: the first 250)")
    study.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON Lines, such as runs/arc.jsonl")
    study.add_argument("--no-decoy", action="store_true", help="leave this control out")
    study.add_argument("--polar", action="store_true", help="search only chains that PoLar's training data can hold")
    study.add_argument("--reorder", type=cola.at_least(0), default=3, metavar="K",
                       help="other orders, or problems, to try the best chain on (default: %(default)s)")
    return p


def decoy_answer(tokenizer, problem, problems, prediction, rng):
    """A wrong answer as described above, or None if there is none."""
    answers = list(problem.choices) or [other.answer for other in problems
                                        if other.level == problem.level and not other.choices]
    rng.shuffle(answers)
    length, taken = len(tokenizer.encode(problem)[1]), (problem.answer, prediction)
    for answer in answers:
        ids = tokenizer.encode(replace(problem, answer=answer))[1]
        written = data.exact_match(tokenizer.decode(ids), answer)  # not so where the tokenizer lacks a character
        if len(ids) == length and written and not any(data.exact_match(answer, other) for other in taken):
            return answer
    return None


def reordered(problem, order):
    """The same problem with its texts in another order under the same labels: first the text order[0], ..."""
    texts = tuple(problem.texts[i] for i in order)
    question = problem.question.removesuffix(data.listed(problem.choices, problem.texts))
    return replace(problem, question=question + data.listed(problem.choices, texts), texts=texts,
                   answer=problem.choices[order.index(problem.choices.index(problem.answer))])


def elsewhere(problems, i, count, rng):
    """Up to `count` problems to try the best chain of problem i on, as described above."""
    problem, others = problems[i], []
    if not problem.choices:
        return [other for other in problems[i + 1:] + problems[:i] if other.level == problem.level][:count]
    for _ in range(20 * min(count, 100)):  # two or three choices have few orders
        other = reordered(problem, rng.sample(range(len(problem.choices)), len(problem.choices)))
        if other.answer != problem.answer and other not in others:
            others.append(other)
    return others[:count]


def search(args, model, tokenizer, problem, seed):
    """Searches one problem: the full model's answer, the Result, the best chain and its answer, or None for both.

    The sample is freed on return, so that there is one cache of hidden states at a time.
    """
    sample, full = cola.Sample(model, tokenizer, problem, args.cache_mb), tuple(range(len(model.layers)))
    prediction, full_correct = sample.answer(full)
    options = {"allowed": common.readable} if args.polar else {}
    result = cola.search(args, sample.verify.score, len(full), seed, sample.verify.departures, **options)
    result.evaluated[full] = full_correct  # `generate` has the last word, on this chain and on the best one
    for best in result.correct():
        text, correct = sample.answer(best)
        if correct:
            return prediction, result, best, text
        result.evaluated[best] = False
    return prediction, result, None, None


def found_at(result):
    """How many chains the search evaluated until the first correct one, that one included; None if none is."""
    return next((i for i, score in enumerate(result.evaluated.values(), 1) if score), None)


def study(args, model, tokenizer, problems, i):
    """The line of sample i, all but its settings."""
    start, problem, seed, full = time.perf_counter(), problems[i], args.seed + i, tuple(range(len(model.layers)))
    rng, decoy, reorder = random.Random(seed), None, None
    prediction, result, best, best_prediction = search(args, model, tokenizer, problem, seed)
    evaluated = result.evaluated
    asked = not evaluated[full] and not args.no_decoy
    wrong = decoy_answer(tokenizer, problem, problems, prediction, rng) if asked else None
    if wrong is not None:
        _, of_decoy, reached, _ = search(args, model, tokenizer, replace(problem, answer=wrong), seed)
        decoy = {"answer": wrong, "found": reached is not None, "depth": None if reached is None else len(reached),
                 "found_at": found_at(of_decoy), "promise": of_decoy.promises.get(full)}
    if best is not None and args.reorder:
        verdicts = []
        for other in elsewhere(problems, i, args.reorder, rng):
            with suppress(ValueError):  # it may be too long for the model
                verdicts.append(cola.Sample(model, tokenizer, other, 0).verify([best, full]))
        reorder = {"asked": len(verdicts), "right": sum(of_best for of_best, _ in verdicts),
                   "full_right": sum(of_full for _, of_full in verdicts)}
    return {"sample": i, "id": problem.id, "level": problem.level, "question": problem.question,
            "gt_ans": problem.answer, "initial_score": float(evaluated[full]), "prediction": prediction, "best": best,
            "best_prediction": best_prediction,
            "found_at": found_at(result), "promise": result.promises.get(full),
            "final_valid_transitions": [chain for chain, correct in evaluated.items() if correct],
            "final_invalid_transitions": [chain for chain, correct in evaluated.items() if not correct],
            "n_layers": len(full), "decoy": decoy, "reorder": reorder, "seconds": round(time.perf_counter() - start, 3)}


def settings_of(args, model, tokenizer):
    """All that a line depends on. Of a path it is the last part: a study may go on where its files lie elsewhere."""
    settings = {name: getattr(args, name) for name in (
        "model", "revision", "dataset", "shots", "split", "search", "simulations", "depth_penalty", "exploration",
        "max_skip", "max_loop", "batch", "seed", "reorder")}
    # These two came later: recorded if given, so that studies made before can be resumed.
    settings |= {name: value for name in ("boxed", "polar") if (value := getattr(args, name))}
    for name in {"model", "dataset", "boxed"} & settings.keys():
        if Path(settings[name]).exists():
            settings[name] = Path(settings[name]).absolute().name
    return settings | {"decoy": not args.no_decoy, "chat": tokenizer.chat, "date": f"{data.DATE:%Y-%m-%d}",
                       "dtype": str(model.lm_head.weight.dtype).removeprefix("torch.")}


def main(args):
    rank, ranks, local_rank = (int(os.environ.get(name, default)) for name, default  # torchrun sets them
                               in [("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)])
    if args.out.suffix == ".gz":
        raise ValueError(f"--out must be a name without .gz, not {args.out}")
    if ranks > 1 and args.device in (None, "cuda") and torch.cuda.is_available():
        args.device = f"cuda:{local_rank}"
    problems = data.load(args.dataset, args.shots, args.split, args.boxed)
    samples = common.parse_samples(args.samples, len(problems))[rank::ranks]
    model, tokenizer = cola.load_checkpoint(args)
    settings = settings_of(args, model, tokenizer)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    own = args.out if ranks == 1 else args.out.with_suffix(f".rank{rank}{args.out.suffix}")
    done = common.read_done(args.out, own, settings)
    lines = [done[i] for i in samples if i in done]
    if other := [line["sample"] for line in lines if line["question"] != problems[line["sample"]].question]:
        raise ValueError(f"{args.out} holds another question as sample {other[0]}; give another --out")
    try:
        with (open(own, "a", encoding="utf-8") as file,
              tqdm(total=len(samples), initial=len(lines), unit="sample", disable=True if rank else None) as bar):
            for i in [i for i in samples if i not in done]:
                try:
                    lines.append(study(args, model, tokenizer, problems, i) | {"settings": settings})
                except ValueError as error:
                    raise ValueError(f"sample {i}: {error}") from None
                file.write(json.dumps(lines[-1]) + "\n")
                file.flush()
                os.fsync(file.fileno())
                best = [line["best"] for line in lines if line["best"] is not None]
                bar.set_postfix({"full": f"{sum(line['initial_score'] for line in lines) / len(lines):.1%}",
                                 "cola": f"{len(best) / len(lines):.1%}",
                                 "depth": f"{sum(map(len, best)) / max(1, len(best)):.2f}"}, refresh=False)
                bar.update()
        print(f"{own}: {len(lines)} of {len(samples)} samples are done")
    except KeyboardInterrupt:
        print(f"study: {len(lines)} of {len(samples)} samples are done; rerun the command to resume", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    cola.exit_on_error("study", main, parser().parse_args())
