"""Problems: a prompt, the right answer, exact match. Every dataset becomes a list of `Problem`s with one form of prompt:

    Question: What is 12 + 7?           Question: What is a cat?
    Answer:                             A. an animal
                                        B. a plant
                                        Answer:

The right continuations are " 19" and " A".

References: ARC, arXiv 1803.05457; MATH, arXiv 2103.03874; GSM8K, arXiv 2110.14168; levels of difficulty as in
DART-Math, arXiv 2407.13690.
"""
import hashlib
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

NUMBERS = {1: 2, 2: 3, 3: 4, 4: 6, 5: 7}  # how many numbers a problem of each arithmetic level adds and subtracts
DATASETS = ("arithmetic", *(f"arithmetic-{level}" for level in NUMBERS))
LIMIT = 100  # every number is below
SIZE = 2000  # problems in each of them


@dataclass(frozen=True)
class Problem:
    """One sample.

    Attributes:
      id: its name in the dataset.
      question: the text asked, with the choices where there are any.
      answer: what the model has to write; for multiple choice a label such as "B".
      choices: the labels to choose from; empty where the answer is free.
      prompt: the text before the answer: worked examples, if asked for, and the question.
    """
    id: str
    question: str
    answer: str
    choices: tuple = ()
    prompt: str = ""


def load(dataset, shots=0):
    """All problems of a dataset; a sample id is a position in this list.

    Args:
      dataset: "arithmetic" (levels mixed), "arithmetic-1" to "arithmetic-5", or the path of a JSON Lines file.
      shots: how many worked examples to put before each question.
    Raises ValueError or OSError with one line that says what to do.
    """
    if shots < 0:
        raise ValueError(f"shots must be 0 or more, not {shots}")
    if dataset in DATASETS:
        levels = [int(dataset[-1])] if dataset[-1].isdigit() else list(NUMBERS)
        problems = by_turns([arithmetic(level, SIZE // len(levels)) for level in levels])
        examples = by_turns([arithmetic(level, shots, test=False) for level in levels])[:shots]
    elif Path(dataset).is_file():
        problems = read_jsonl(dataset)
        examples = problems[:shots + 1]  # one more, for no problem is its own example
        if len(examples) <= shots:
            raise ValueError(f"{dataset} has {len(problems)} rows, too few for {shots} worked examples; use fewer --shots")
    else:
        raise ValueError(f"dataset {dataset!r} is neither a file nor one of {', '.join(DATASETS)}")
    return [replace(problem, prompt=prompt(problem, [e for e in examples if e != problem][:shots]))
            for problem in problems]


def prompt(problem, examples):
    """The one form of prompt for all datasets and models."""
    solved = "".join(f"Question: {example.question}\nAnswer: {example.answer}\n\n" for example in examples)
    return f"{solved}Question: {problem.question}\nAnswer:"


def exact_match(prediction, answer):
    """Whether two answers are the same text, white space around them aside."""
    return prediction.strip() == answer.strip()


# Arithmetic: generated, the same on every machine.

def random_sum(rng, n_numbers, limit=LIMIT):
    """A question and its answer, as "What is 12 + 7 - 30?" and "-11", with numbers below the limit."""
    value = rng.randrange(limit)
    question = f"What is {value}"
    for _ in range(n_numbers - 1):
        sign, number = rng.choice("+-"), rng.randrange(limit)
        question += f" {sign} {number}"
        value += number if sign == "+" else -number
    return f"{question}?", str(value)


def is_test(question):
    """A quarter of all questions, by hash: tiny is trained on the others only."""
    return hashlib.sha256(question.encode()).digest()[0] < 64


def arithmetic(level, size, test=True):
    """The first `size` distinct test (or training) problems of a level."""
    rng, answers = random.Random(level), {}
    while len(answers) < size:
        question, answer = random_sum(rng, NUMBERS[level])
        if is_test(question) == test:
            answers[question] = answer
    return [Problem(f"arithmetic-{level}/{i}", *row) for i, row in enumerate(answers.items())]


def by_turns(lists):
    """One from each list, then the next from each: [[1, 2], [3, 4]] becomes [1, 3, 2, 4]."""
    return [item for items in zip(*lists) for item in items]


# JSON Lines: one row a line, in any of the forms that `read_row` knows.

def read_jsonl(path):
    problems = []
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    problems.append(read_row(json.loads(line), f"{path}, line {number}", position=len(problems)))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8; give a JSON Lines file") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error}); each line must hold one JSON object") from None
    if not problems:
        raise ValueError(f"{path} holds no rows; give a JSON Lines file with at least one")
    return problems


def read_row(row, where, position):
    """A Problem from a row as ARC, MATH, GSM8K, or anyone with a question and an answer, writes it."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be a JSON object, not {type(row).__name__}")
    question = row.get("question", row.get("problem"))
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f'{where}: no question; a row needs the text under "question" or "problem"')
    question, choices = question.strip(), ()
    if "choices" in row:
        try:
            choices, texts = tuple(map(str, row["choices"]["label"])), row["choices"]["text"]
            question += "".join(f"\n{label}. {text}" for label, text in zip(choices, texts, strict=True))
        except (TypeError, KeyError, ValueError):
            raise ValueError(f'{where}: choices must be {{"text": [...], "label": [...]}}, of equal length') from None
        answer = str(row.get("answerKey"))
        if answer not in choices:
            raise ValueError(f"{where}: answerKey {answer!r} is none of the choices {', '.join(choices)}")
    else:
        answer = row.get("answer")
        if isinstance(answer, str) and "####" in answer:  # GSM8K: the solution, then "#### 1,234"
            answer = answer.rpartition("####")[2].replace(",", "")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise ValueError(f'{where}: no answer; a row needs it under "answer", or "answerKey" with choices')
    return Problem(str(row.get("id", row.get("unique_id", position))), question, str(answer).strip(), choices)
