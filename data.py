"""Problems: question, correct answer, exact match; and their encoding as token ids.

Every dataset becomes a list of `Problem`s with one form of prompt: a line such as "Question: What is 12 + 7?" and the
line "Answer:", which " 19" continues. A chat model gets the same question as a message, in its own template.

References: ARC, arXiv 1803.05457; MATH, arXiv 2103.03874; GSM8K, arXiv 2110.14168; levels of difficulty as in
DART-Math, arXiv 2407.13690.
"""
import hashlib
import json
import random
import re
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path

import jinja2.ext
from huggingface_hub import cached_assets_path, constants, get_session, snapshot_download
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, tqdm
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as RustTokenizer

TERMS_OF_LEVEL = {1: 3, 2: 4, 3: 5, 4: 6, 5: 7}  # arithmetic: how many numbers a problem of each level has
NUMBERS_BELOW = 20  # every number is from 0 to 19
N_PROBLEMS = 2000  # in each arithmetic dataset
# Fetched through the hub's dataset viewer: repository, configuration.
FROM_VIEWER = {"arc-easy": ("allenai/ai2_arc", "ARC-Easy"),
               "arc-challenge": ("allenai/ai2_arc", "ARC-Challenge"),
               "gsm8k": ("openai/gsm8k", "main")}
ARITHMETIC = ("arithmetic", *(f"arithmetic-{level}" for level in TERMS_OF_LEVEL))
MATH = ("math", "math-1", "math-2", "math-3", "math-4", "math-5")
DATASETS = (*ARITHMETIC, *FROM_VIEWER, *MATH)
# Where two of these files disagree, the later one counts.
SETTINGS = ("special_tokens_map.json", "tokenizer_config.json", "config.json", "generation_config.json")
DATE = datetime(2024, 7, 26)  # given to chat templates as today, so that prompts never change


@dataclass(frozen=True)
class Problem:
    """A question with its correct answer and its prompt, as text; cola.py's `Sample` holds it as token ids."""
    id: str  # its name in the dataset
    question: str  # the text, including any choices
    answer: str  # what the model has to write; for multiple choice a label such as "B"
    choices: tuple = ()  # the labels to choose from; none if the answer is free
    texts: tuple = ()  # what the labels stand for
    level: int | None = None  # its difficulty, if the dataset has levels
    examples: tuple = ()  # worked examples to show before it, as Problems
    form: str | None = None  # its prompt, if that asks for \boxed{ANSWER}, with {question} in it; None: the default

    @property
    def formatted(self):
        """The question inside its prompt."""
        return (self.form or "Question: {question}\nAnswer:").replace("{question}", self.question)

    @property
    def prompt(self):
        """The text to continue, for base models."""
        return "".join(f"{example.formatted} {example.answer}\n\n" for example in self.examples) + self.formatted

    @property
    def messages(self):
        """The conversation for a chat model, answer included. It asks for the bare answer, without an explanation."""
        turns = []
        for problem in (*self.examples, self):
            wanted = "letter of the right choice" if problem.choices else "final answer"
            content = problem.formatted if problem.form else f"{problem.question}\nAnswer with the {wanted} only."
            turns += [{"role": "user", "content": content}, {"role": "assistant", "content": problem.answer}]
        return turns


def listed(choices, texts):
    """The choices as lines below a question."""
    return "".join(f"\n{label}. {text}" for label, text in zip(choices, texts, strict=True))


def load(dataset, shots=0, split=None, boxed=None):
    """All problems of a dataset; a sample id is a position in this list.

    Args:
      dataset: a name in DATASETS, or the path of a JSON Lines file.
      shots: number of worked examples: other problems of the dataset or, for arithmetic, training problems.
      split: "train", "validation" or "test", for benchmarks that have several; None means "test".
      boxed: the path of a prompt with {question} in it that asks for \\boxed{ANSWER}; None asks for the bare answer.
    Raises ValueError or OSError (including huggingface_hub's errors) that says what is wrong.
    """
    if not 0 <= shots <= 100:
        raise ValueError(f"shots must be between 0 and 100, not {shots}")
    if split is not None and dataset not in FROM_VIEWER:
        raise ValueError(f"{dataset} has no splits; omit --split")
    if dataset in ARITHMETIC:
        levels = [level for level in TERMS_OF_LEVEL if dataset in ("arithmetic", f"arithmetic-{level}")]
        problems = by_turns([arithmetic(level, N_PROBLEMS // len(levels)) for level in levels])
        pool = by_turns([arithmetic(level, shots + 1, test=False) for level in levels])
    elif dataset in FROM_VIEWER:
        problems = pool = read_jsonl(fetch_rows(*FROM_VIEWER[dataset], split or "test"))
    elif dataset in MATH:
        folder = snapshot_download("HuggingFaceH4/MATH-500", repo_type="dataset", allow_patterns="test.jsonl")
        every = read_jsonl(Path(folder) / "test.jsonl")
        problems = pool = [problem for problem in every if dataset in ("math", f"math-{problem.level}")]
    elif Path(dataset).is_file():
        problems = pool = read_jsonl(dataset)
    else:
        raise ValueError(f"{dataset!r} is neither the path of a file nor one of {', '.join(DATASETS)}")
    if boxed is not None:
        form = Path(boxed).read_text(encoding="utf-8", errors="replace").rstrip("\n")
        if "{question}" not in form or "\N{REPLACEMENT CHARACTER}" in form:
            raise ValueError(f"{boxed} must be text in UTF-8 with a place for the question; write {{question}} there")
        problems, pool = ([in_box(problem, form) for problem in each] for each in (problems, pool))
    pool = [*{problem.question: problem for problem in pool}.values()][:shots + 1]  # one may be the problem itself
    if len(pool) <= shots:
        raise ValueError(f"{dataset} has too few questions ({len(pool)}) for {shots} examples; use fewer --shots")
    return [replace(problem, examples=tuple(other for other in pool if other.question != problem.question)[:shots])
            for problem in problems]


def in_box(problem, form):
    """The problem in a form that asks for \\boxed{ANSWER}, which is complete at the closing brace."""
    if problem.choices or set(problem.answer) & {*"{}"}:
        raise ValueError(f"sample {problem.id} has choices or a brace in its answer, which fit no box; remove its row")
    return replace(problem, answer=f"\\boxed{{{problem.answer}}}", form=form)


def exact_match(prediction, answer):
    """Whether two answers are the same text, apart from surrounding white space."""
    return prediction.strip() == answer.strip()


def random_sum(rng, n_terms, limit=NUMBERS_BELOW):
    """A question and its answer, as "What is 12 + 7 - 13?" and "6", with numbers below the limit."""
    value = rng.randrange(limit)
    question = f"What is {value}"
    for _ in range(n_terms - 1):
        sign, number = rng.choice("+-"), rng.randrange(limit)
        question += f" {sign} {number}"
        value += number if sign == "+" else -number
    return f"{question}?", str(value)


def is_test(question):
    """Whether a question is held out: a quarter are, by hash, and tiny is trained on the others."""
    return hashlib.sha256(question.encode()).digest()[0] < 64


def arithmetic(level, size, test=True, limit=NUMBERS_BELOW):
    """The first `size` distinct test (or training) problems of a level, identical on every machine."""
    rng, answers = random.Random(level), {}
    while len(answers) < size:
        question, answer = random_sum(rng, TERMS_OF_LEVEL[level], limit)
        if is_test(question) == test:
            answers[question] = answer
    return [Problem(f"arithmetic-{level}/{i}", *row, level=level) for i, row in enumerate(answers.items())]


def by_turns(lists):
    """Interleaves lists: [[1, 2], [3, 4]] becomes [1, 3, 2, 4]."""
    return [item for items in zip(*lists) for item in items]


def read_jsonl(path):
    """The problems of a JSON Lines file. Raises ValueError that names the line and what is wrong with it."""
    problems, answers = [], {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8-sig"), parse_constant=lambda name: None)  # NaN is no answer
            json.dumps(row, ensure_ascii=False).encode()  # refuses a lone surrogate such as \ud83d
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON in UTF-8 ({error}); write one object per line") from None
        problem = read_row(row, where, position=len(problems))
        problems.append(problem)
        if (other := answers.setdefault(problem.question, problem.answer)) != problem.answer:
            raise ValueError(f"{where}: an earlier line answers this question with {other!r}; leave one of them out")
    if not problems:
        raise ValueError(f"{path} holds no rows; give a JSON Lines file with at least one")
    return problems


def read_row(row, where, position):
    """A Problem from a row in the form of ARC, MATH or GSM8K, or any other with a question and an answer."""
    question = row.get("question", row.get("problem")) if isinstance(row, dict) else None
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f'{where}: no question; a row is a JSON object with a text under "question" or "problem"')
    question, choices, texts = question.strip(), (), ()
    match row.get("choices"):
        case None:
            answer = row.get("answer")
            if isinstance(answer, str) and "####" in answer:  # GSM8K: the solution, then "#### 1,234"
                answer = answer.rpartition("####")[2].replace(",", "")
        case {"text": [*texts], "label": [*labels]} if len(texts) == len(labels):
            choices = [str(label).strip() for label in labels]
            question += listed(choices, texts)
            answer = str(row.get("answerKey", "")).strip()
            if answer not in choices:
                raise ValueError(f"{where}: answerKey {answer!r} is none of the choices {', '.join(choices)}")
        case _:
            raise ValueError(f'{where}: choices must be {{"text": [...], "label": [...]}}, of equal length')
    text = str(answer).strip()
    if type(answer) not in (str, int, float) or not text or "\n" in text:
        raise ValueError(f'{where}: no answer of one line; a row needs it under "answer", or "answerKey" with choices')
    name = str(row.get("id", row.get("unique_id", position)))
    return Problem(name, question, text, tuple(choices), tuple(texts), row.get("level"))


def fetch_rows(repo, config, split):
    """The path of a JSON Lines file with a hub dataset's rows, fetched once from its viewer into the hub's cache."""
    file = cached_assets_path("cola", repo, f"{config}--{split}") / "rows.jsonl"
    if file.is_file():
        return file
    viewer = constants.ENDPOINT.replace("https://", "https://datasets-server.")  # sends any dataset as JSON
    rows, total = [], 1  # at least one, until the viewer says how many
    with tqdm(desc=f"{repo} {split}", unit="row", disable=None) as bar:
        while len(rows) < total:
            query = {"dataset": repo, "config": config, "split": split, "offset": len(rows), "length": 100}
            response = get_session().get(f"{viewer}/rows", params=query, headers=build_hf_headers(), timeout=30)
            hf_raise_for_status(response)
            page = response.json()
            if not page.get("rows"):
                raise ValueError(f"{viewer} did not send the rows of {repo} that it was asked for; try again later")
            rows += [row["row"] for row in page["rows"]]
            total = bar.total = page["num_rows_total"]
            bar.update(len(page["rows"]))
    part = file.with_suffix(f".{random.SystemRandom().getrandbits(64)}")  # another process may be writing its own
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return part.replace(file)


class Tokenizer:
    """Text to token ids and back, exactly as the checkpoint was trained.

    Args:
      folder: the checkpoint's; needs tokenizer.json, and uses the files of SETTINGS and chat_template.jinja if present.
      chat: whether to apply the chat template, if there is one.
    Attributes:
      stop: set of ids that end an answer: end-of-text tokens, and line breaks preceded by white space only.
      texts: {id: text} of every token.
    Raises ValueError with one line that says what to do.
    """

    def __init__(self, folder, chat=True):
        try:
            self.tokenizer = RustTokenizer.from_file(str(folder / "tokenizer.json"))
            self.tokenizer.no_padding()
            self.tokenizer.no_truncation()
            self.decode = self.tokenizer.decode
            settings = {}  # of all files together
            for file in map(folder.joinpath, SETTINGS):
                if file.is_file():
                    values = json.loads(file.read_text(encoding="utf-8"))
                    settings |= {name: value for name, value in values.items() if value is not None}
            source, file = settings.get("chat_template"), folder / "chat_template.jinja"
            if file.is_file():
                source = file.read_text(encoding="utf-8")
            elif isinstance(source, list):  # several, by name
                source = {entry["name"]: entry["template"] for entry in source}.get("default")
            self.chat = chat and bool(source)
            if self.chat:
                special = {name: token["content"] if isinstance(token, dict) else token
                           for name, token in settings.items() if name.endswith("_token")}
                self.template = compile_template(source, special)
            ids = self.tokenizer.get_vocab().values()  # there may be gaps
            self.texts = dict(zip(ids, self.tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)))
            ends = settings.get("eos_token_id")
            self.stop = {int(i) for i in (ends if isinstance(ends, list) else [ends]) if i is not None}
            self.stop |= {i for i, text in self.texts.items() if re.match(r"\s*\n", text)}
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise ValueError(f"{folder}: tokenizer.json or a file beside it is missing or malformed ({error!r}); fetch "
                             "the checkpoint again, or use --no-chat if it is the chat template") from None

    def encode_text(self, text, special=True):
        """Ids of a text. A rendered chat contains its special tokens; to other text, tokenizer.json adds its own."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=special and not self.chat).ids
        except Exception as error:  # it has no token for part of the text, say
            raise ValueError(f"the tokenizer cannot encode {text!r:.60} ({error}); use another checkpoint") from None

    def encode(self, problem):
        """Ids of a problem's prompt, and of its answer as a continuation of the prompt."""
        prompt, answer = problem.prompt, f" {problem.answer}"
        if self.chat:
            prompt, answer = self.render(problem.messages[:-1]), problem.answer
            before = self.render(problem.messages, answered=True).removeprefix(prompt).partition(answer)[0]
            answer = before + answer if before.isspace() else answer  # some templates put a space before each answer
        ids, both = self.encode_text(prompt), self.encode_text(prompt + answer)
        if both[:len(ids)] != ids:  # a token spans the boundary
            both = ids + self.encode_text(answer, special=False)
        return ids, both[len(ids):]

    def render(self, messages, answered=False):
        """The conversation as text, up to where the model answers unless it is answered already."""
        try:
            return self.template.render(messages=messages, add_generation_prompt=not answered, tools=None,
                                        documents=None, enable_thinking=False)  # exact match wants the answer alone
        except Exception as error:  # a template is third-party code
            raise ValueError(f"the chat template fails ({error}); use --no-chat") from None


def compile_template(source, special):
    """A chat template, in jinja2's sandbox, with what transformers gives to it; special: {name: special token}."""
    def raise_exception(message):
        raise jinja2.TemplateError(message)
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    sandbox.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": DATE.strftime, **special}
    # {% generation %} marks what a model is trained to write. jinja2 lacks it; {% with %} has no effect either.
    return sandbox.from_string(re.sub(r"({%[-+]?\s*(?:end)?)generation(?=\s*[-+]?%})", r"\1with", source))
