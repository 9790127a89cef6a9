"""A Llama-style decoder whose layers can be applied in any order, any number of times.

A *chain* is a list of layer indices. `Llama.forward(tokens, chain)` applies those layers from left to right
between the embedding and the final norm: an index left out is a layer skipped, an index repeated is a layer looped.

References: CoLa, arXiv 2507.07996 (chains of layers); Llama 2, arXiv 2307.09288 (the architecture);
RoPE, arXiv 2104.09864; grouped-query attention, arXiv 2305.13245; speculative decoding, arXiv 2211.17192 (`Verifier`).
"""
import json
import math
import re
from collections import OrderedDict
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "olmoe", "qwen2_moe", "qwen3_moe")
HEAD_ROWS = 256  # positions that go through the head at once; over a large vocabulary, logits take much memory


@dataclass
class Config:
    """The part of a Hugging Face config.json that the decoder needs, under the same names."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    rms_norm_eps: float
    num_key_value_heads: int = 0  # 0: as many as query heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rope_parameters: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    clip_qkv: float = 0.0  # bound of queries, keys and values (OLMoE); 0: none
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, path):
        """Reads config.json. Raises OSError, and ValueError for what this decoder would compute incorrectly."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            # transformers 5 writes rope_parameters; older checkpoints have rope_theta, and rope_scaling with a "type".
            rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
            if raw.get("rope_scaling") not in (None, rope):
                raise ValueError("rope_parameters and rope_scaling differ")
            rope = {"rope_type": rope.pop("type", "default"), "rope_theta": raw.get("rope_theta", 10000.0), **rope}
            raw = {"hidden_act": "silu", "partial_rotary_factor": 1, **raw, **rope, "rope_parameters": rope}
            for name, valid in {"model_type": MODEL_TYPES, "hidden_act": ["silu"], "partial_rotary_factor": [1],
                                "rope_type": ["default", "linear", "llama3"], "quantization_config": [None]}.items():
                if raw.get(name) not in valid:
                    raise ValueError(f"{name} {raw.get(name)!r} is not supported, only {[*valid]}")
            # Some configs write 0 or null for what is absent, or 1 for 1.0.
            values = {entry.name: entry.type(raw[entry.name]) for entry in fields(cls) if raw.get(entry.name)}
            for name, value in values.items():
                if value != raw[name] or isinstance(value, (int, float)) and not 0 <= value < 2 ** 24:  # false for NaN
                    raise ValueError(f"{name} {raw[name]!r} has the wrong type or is out of range")
            config = cls(**values)
            if not rope_table(config, 0, 1, torch.empty(0))[0].isfinite().all():
                raise ValueError(f"RoPE cannot be computed with {rope}")
            # Within its first window, sliding attention is full attention, so ending the positions there is enough.
            window = raw.get("sliding_window", 4096 if raw["model_type"] == "mistral" else None)
            if window and raw.get("use_sliding_window", True):
                config.max_position_embeddings = min(config.max_position_embeddings, window)
            return config
        except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not describe a supported decoder ({error}); use another checkpoint, or "
                             "fetch it again") from None


class KVCache:
    """Keys and values of past tokens, a slot for each step of one chain: a looped layer makes new ones each time."""

    def __init__(self):
        self.length, self.chain = 0, None  # number of tokens held, and the chain that they went through
        self.slots = {}  # {step: (keys, values)}, each [B, key/value heads, length, head_dim]

    def append(self, step, k, v):
        """Adds the keys and values of new tokens to one slot; returns all that the slot then holds."""
        if step in self.slots:  # copies all past tokens; a preallocated buffer would not, but answers are short
            k, v = (torch.cat((past, new), dim=2) for past, new in zip(self.slots[step], (k, v)))
        self.slots[step] = k, v
        return k, v


class RMSNorm(nn.RMSNorm):
    """torch's, but in float32 up to the product with the weight, as the published checkpoints expect."""

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), self.normalized_shape, eps=self.eps).to(x.dtype)


class Linear(nn.Linear):
    """A linear layer that uses oneDNN, on AMD twice as fast as torch's MKL, for float32 inference on a CPU."""

    def forward(self, x):
        large = x.numel() * self.out_features > 2 ** 22  # multiplications; for fewer, a call to oneDNN costs too much
        if (large and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
                and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
            return F.linear(x.to_mkldnn(), self.weight, self.bias).to_dense()
        return super().forward(x)


def rope_table(config, start, end, like):
    """cos and sin of the angles of positions start..end-1, each [end - start, head_dim] (RoPE, section 3.2.2).

    Their dtype and device are those of `like`. Raises ValueError for no positions, or more than the model has.
    """
    if start == end:
        raise ValueError("there are no tokens to run; give at least one")
    if end > config.max_position_embeddings:
        raise ValueError(f"{end} tokens are more than the model's {config.max_position_embeddings} positions; use "
                         "another sample or fewer worked examples")
    half = torch.arange(0, config.head_dim, 2, device=like.device).float() / config.head_dim
    rope, frequency = config.rope_parameters, config.rope_parameters["rope_theta"] ** -half
    if rope["rope_type"] == "linear":
        frequency = frequency / rope["factor"]
    elif rope["rope_type"] == "llama3":  # scale only the frequencies that make few turns within the original length
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        keep = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        frequency = torch.lerp(frequency / rope["factor"], frequency, keep.clamp(0, 1))
    angle = torch.outer(torch.arange(start, end, device=like.device).float(), frequency).repeat(1, 2)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x, cos, sin):
    """Turns each head of x [B, heads, T, head_dim] by its position's angles; i pairs with i + head_dim / 2."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class Attention(nn.Module):
    """Causal attention in which several query heads share one key/value head."""

    def __init__(self, config, tensors):
        super().__init__()
        self.head_dim, self.clip = config.head_dim, config.clip_qkv
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size, bias="self_attn.q_proj.bias" in tensors)
        self.k_proj = Linear(config.hidden_size, kv_size, bias="self_attn.k_proj.bias" in tensors)
        self.v_proj = Linear(config.hidden_size, kv_size, bias="self_attn.v_proj.bias" in tensors)
        self.o_proj = Linear(q_size, config.hidden_size, bias="self_attn.o_proj.bias" in tensors)
        self.q_norm = self.k_norm = None
        if "self_attn.q_norm.weight" in tensors:  # over each head (Qwen3), or over all of them (OLMoE)
            per_head = len(tensors["self_attn.q_norm.weight"]) == config.head_dim
            self.q_norm = RMSNorm(config.head_dim if per_head else q_size, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim if per_head else kv_size, config.rms_norm_eps)

    def heads(self, x, norm=None):
        """[B, T, heads * head_dim] to [B, heads, T, head_dim], normalized and clipped if the model does so."""
        if norm is not None:  # over each head or over all heads, as its size says
            x = norm(x.unflatten(-1, (-1, len(norm.weight)))).flatten(-2)
        if self.clip:
            x = x.clamp(-self.clip, self.clip)
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x, rope, cache=None, step=None):
        q = rotate(self.heads(self.q_proj(x), self.q_norm), *rope)  # [B, heads, T, head_dim]
        k = rotate(self.heads(self.k_proj(x), self.k_norm), *rope)  # [B, key/value heads, T, head_dim]
        v = self.heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.append(step, k, v)  # [B, key/value heads, past + T, head_dim]
        new, known, mask = q.shape[2], k.shape[2], None  # a single new token sees every key
        if 1 < new < known:  # is_causal would align the first query with the first key
            mask = torch.ones(new, known, dtype=torch.bool, device=x.device).tril(known - new)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=1 < new == known, enable_gqa=True)  # shaped like q
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: a gated feed-forward network."""

    def __init__(self, hidden_size, intermediate_size, bias=False):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Mixture of experts: each token goes to a few of many small MLPs, and to a shared one if there is one."""

    def __init__(self, config, tensors):
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        size, n_experts = config.hidden_size, len(tensors["mlp.gate.weight"])
        if not 1 <= self.top_k <= n_experts <= len(tensors):  # a malformed gate may have any length
            raise ValueError(f"config.json asks for {self.top_k} of {n_experts} experts; fetch the checkpoint again")
        self.gate = Linear(size, n_experts, bias=False)
        expert_size = len(tensors["mlp.experts.0.gate_proj.weight"])
        self.experts = nn.ModuleList(MLP(size, expert_size) for _ in range(n_experts))
        self.shared_expert = None
        if "mlp.shared_expert_gate.weight" in tensors:
            self.shared_expert = MLP(size, len(tensors["mlp.shared_expert.gate_proj.weight"]))
            self.shared_expert_gate = Linear(size, 1, bias=False)

    def forward(self, x):
        flat = x.flatten(0, -2)
        weights, chosen = self.gate(flat).float().softmax(-1).topk(self.top_k)  # [tokens, top_k]
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        y, chosen, weights = torch.zeros_like(flat), chosen.flatten(), weights.flatten()  # [tokens * top_k]
        counts = (chosen[:, None] == torch.arange(len(self.experts), device=x.device)).sum(0).tolist()  # synchronizes
        for expert, places in zip(self.experts, chosen.argsort().split(counts)):
            if len(places):
                token = places // self.top_k
                y.index_add_(0, token, expert(flat[token]) * weights[places, None].to(x.dtype))
        if self.shared_expert is not None:
            y = y + self.shared_expert_gate(flat).sigmoid() * self.shared_expert(flat)
        return y.view_as(x)


class Layer(nn.Module):
    """One module of a chain. It adds to the hidden states, so skipping or repeating it leaves them usable."""

    def __init__(self, config, tensors, sparse):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, tensors)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Experts(config, tensors) if sparse else MLP(
            config.hidden_size, config.intermediate_size, bias="mlp.gate_proj.bias" in tensors)

    def forward(self, x, rope, cache=None, step=None):
        """Hidden states [B, T, hidden_size] to those after this layer; `step` is this layer's slot in the cache."""
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, step)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The decoder. Its parameters are named as in a Hugging Face checkpoint, less the leading "model.".

    `tensors`, {name: tensor} of the checkpoint, shows its optional parts; without them, this is a plain Llama.
    """

    def __init__(self, config, tensors=None):
        super().__init__()
        self.config, tensors = config, tensors or {}
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # The tensors of all layers together, so that loading refuses a layer without one that others have.
        of_layers = {name.split(".", 2)[-1]: tensor for name, tensor in tensors.items() if name.startswith("layers.")}
        self.layers = nn.ModuleList(Layer(config, of_layers, sparse=f"layers.{i}.mlp.gate.weight" in tensors)
                                    for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @classmethod
    def from_pretrained(cls, path_or_repo, device=None, dtype=None, revision=None):
        """Loads a checkpoint in the Hugging Face layout: config.json and one or several .safetensors files.

        Args:
          path_or_repo: a checkpoint's folder, or its "org/name" on the hub.
          device, dtype: by default the GPU, if there is one, with torch.bfloat16; otherwise the CPU with torch.float32.
          revision: branch, tag or commit on the hub; None means main.
        Raises ValueError or OSError (also of huggingface_hub) that says what is wrong.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError, ImportError) as error:
            raise ValueError(f"device '{device}' is unavailable ({str(error)[:90]}); use another, say cpu") from None
        dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
        path = fetch(path_or_repo, revision)
        config = Config.from_json(path / "config.json")
        try:
            weights = {name.removeprefix("model."): nn.Parameter(tensor, requires_grad=False)  # still memory-mapped
                       for file in weight_files(path) for name, tensor in load_file(file).items()
                       if not name.endswith("rotary_emb.inv_freq")}  # in old checkpoints; follows from the config
            if config.num_hidden_layers > len(weights):
                raise RuntimeError(f"too few tensors for {config.num_hidden_layers} layers")
            if config.tie_word_embeddings:  # one Parameter under two names, unless the checkpoint has two
                weights.setdefault("lm_head.weight", weights.get("embed_tokens.weight"))
            with torch.device("meta"):  # no memory yet: the tensors become the parameters
                model = cls(config, weights).requires_grad_(False)
            model.load_state_dict(weights, assign=True)
        except (KeyError, OSError, RuntimeError, TypeError, SafetensorError) as error:
            raise ValueError(f"{path}: the weights are incomplete or do not match config.json ({str(error)[:300]}); "
                             "fetch the checkpoint again, in the safetensors format") from None
        for name, parameter in model.named_parameters():
            if parameter.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"{path}: tensor {name} is {parameter.dtype}; use a checkpoint that is not quantized")
            parameter.data = parameter.data.to(device, dtype)
            if not parameter.numel() or not all(map(torch.isfinite, parameter.aminmax())):  # NaN spreads to both
                raise ValueError(f"{path}: tensor {name} is empty or holds NaN or infinity as {dtype}; use another "
                                 "--dtype, or fetch it again")
        return model.requires_grad_().eval()

    def hidden(self, tokens, chain=None, cache=None):
        """Normalized last hidden states [B, T, hidden_size]; arguments as for `forward`."""
        chain = check_chain(range(len(self.layers)) if chain is None else chain, len(self.layers))
        cache = KVCache() if cache is None else cache
        if cache.chain not in (None, chain):
            raise ValueError(f"this cache holds chain {list(cache.chain)}; make a new KVCache for {list(chain)}")
        end = cache.length + tokens.shape[1]
        rope = rope_table(self.config, cache.length, end, like=self.embed_tokens.weight)
        x = self.embed_tokens(tokens)  # [B, T, hidden_size]
        for step, layer in enumerate(chain):
            x = self.layers[layer](x, rope, cache, step)
        cache.length, cache.chain = end, chain
        return self.norm(x)

    def forward(self, tokens, chain=None, cache=None):
        """Logits [B, T, vocab_size] of the token after each position.

        Args:
          tokens: ids [B, T]; with a cache, only those that it does not hold yet.
          chain: layer indices in order of application, any number of each, possibly none; None means every layer once.
          cache: a KVCache that holds the earlier tokens under this same chain, and takes these in.
        Raises ValueError for a layer that does not exist, no tokens, too many of them, or a cache of another chain.
        """
        return self.lm_head(self.hidden(tokens, chain, cache))

    @torch.inference_mode()
    def generate(self, tokens, chain=None, max_new_tokens=32, stop=(), stop_after=()):
        """Greedy decoding: a list of prompt ids to the list of new ids.

        Ends before the first token in `stop`, after the first in `stop_after` (each a set of ids or None), and at the
        model's last position. Raises ValueError as `forward` does.
        """
        cache, new = KVCache(), []
        chain = None if chain is None else tuple(chain)  # an iterator would be empty after the first token
        unread = torch.tensor([tokens], device=self.lm_head.weight.device)  # the whole prompt (prefill)
        while len(new) < max_new_tokens:
            token = self.lm_head(self.hidden(unread, chain, cache)[0, -1]).argmax().item()
            if token in (stop or ()):
                break
            new.append(token)
            if token in (stop_after or ()) or cache.length == self.config.max_position_embeddings:
                break
            unread = unread.new_tensor([[token]])  # then one token at a time (decode)
        return new


def check_chain(chain, n_layers):
    """The chain as a tuple; raises ValueError if a layer in it does not exist."""
    chain = tuple(chain)
    for layer in chain:
        if not 0 <= layer < n_layers:
            raise ValueError(f"layer {layer} does not exist; the model has layers 0 to {n_layers - 1}")
    return chain


class Verifier:
    """Scores chains on one problem: does greedy decoding under the chain write the answer, and how likely is it?

    One forward pass per chain. As in speculative decoding the answer is a draft: greedy decoding writes it if and only
    if, in a pass over prompt + answer, each of its tokens is the argmax given all tokens before it. So there is no
    decoding loop and no key/value cache, and the head runs on the answer's positions only.

    A prefix that several chains share runs once (its hidden states are kept, up to `cache_mb`), and the chains whose
    next layer is the lowest run it as one batch, so its weights are read once. Most chains climb, so they soon reach
    the layers at which others wait. For (0 1 2 3), (0 2 3) and (0 1 1 2), 8 layer steps instead of 11:

        batch          1    2           3        4                     5
        layer          0    1           1        2                     3
        prefixes run   (0)  (0 1)       (0 1 1)  (0 1 2) (0 2)         (0 1 2 3) (0 2 3)
                                                 (0 1 1 2)

    Args:
      prompt, answer: token ids; a prompt has at least one.
      stop: set of ids, one of which must follow the answer; None if the answer is complete without one.
      cache_mb: megabytes (2 ** 20 bytes) of hidden states to keep for later calls; it changes scores by rounding only.
      fused: set of ids of tokens that spell the answer's last token and a stop, such as ")\\n" for ")".
    Raises ValueError for an empty prompt, or more tokens than the model has positions.
    """

    def __init__(self, model, prompt, answer, stop=None, cache_mb=1024, fused=()):
        if not len(prompt):
            raise ValueError("the prompt has no tokens; give it at least one")
        to_ids = partial(torch.tensor, dtype=torch.long, device=model.lm_head.weight.device)
        # A tokenizer, or its settings, may know ids that the model does not; it never writes those.
        stops, fused = [[i for i in ids or () if 0 <= i < model.config.vocab_size] for ids in (stop, fused)]
        self.answer, self.stop, self.fused = to_ids(answer), None if stop is None else to_ids(stops), to_ids(fused)
        # The positions whose logits predict the answer and, if there is to be one, the stop after it.
        self.positions = slice(len(prompt) - 1, len(prompt) - 1 + max(1, len(answer) + (stop is not None)))
        self.model, self.tokens = model, to_ids([[*prompt, *answer]])  # [1, T]
        self.rope = rope_table(model.config, 0, len(prompt) + len(answer), like=model.embed_tokens.weight)
        self.states = OrderedDict()  # {prefix: the hidden states after it}, the least recently used first
        self.max_states = cache_mb * 2 ** 20 // (self.tokens.numel() * model.embed_tokens.weight[0].nbytes)
        self.steps_asked = self.steps_run = 0  # layer steps of all chains so far, and those run for them

    def __call__(self, chains):
        """A list of chains to a list of bool: whether each is correct."""
        return [correct for correct, _ in self.score(chains)]

    @torch.inference_mode()
    def score(self, chains):
        """A list of chains to a list of (correct, promise).

        correct: whether greedy decoding writes the answer and stops. promise: the mean log-probability of the answer's
        tokens and of a stop, if there must be one, by itself or fused with the last token; -inf if the logits overflow.
        Raises ValueError for a layer that the model does not have.
        """
        if not chains:
            return []
        states = self.run([check_chain(chain, len(self.model.layers)) for chain in chains])
        parts = states.split(max(1, HEAD_ROWS // states.shape[1]))
        correct, promises = (torch.cat(column).tolist() for column in zip(*map(self.judge, parts)))
        return [*zip(correct, promises)]

    def judge(self, hidden):
        """correct and promise, each [chains], from the states at `positions`, [chains, len(positions), hidden_size]."""
        logits, n = self.model.lm_head(self.model.norm(hidden)).float(), len(self.answer)
        log_total, greedy = logits.logsumexp(-1), logits.argmax(-1)  # [chains, len(positions)]
        matches = greedy[:, :n] == self.answer  # [chains, n]
        log_tokens = logits[:, :n].take_along_dim(self.answer[None, :, None], -1).squeeze(-1) - log_total[:, :n]
        # There are two ways to end: the last token and then a stop, or both fused in one token.
        def one_of(ids, at):
            return (greedy[:, at, None] == ids).any(-1), logits[:, at, ids].logsumexp(-1) - log_total[:, at]
        stops, log_stop = (True, 0) if self.stop is None else one_of(self.stop, n)
        fuses, log_fused = one_of(self.fused, n - 1)
        correct = (matches.all(-1) & stops) | (matches[:, :-1].all(-1) & fuses)
        log_answer = torch.logaddexp(log_tokens.sum(-1) + log_stop, log_tokens[:, :-1].sum(-1) + log_fused)
        # Logits that overflow give no promise; rounding may lift one above 0.
        promise = (log_answer / logits.shape[1]).nan_to_num(nan=-math.inf, neginf=-math.inf).clamp(max=0)
        return correct, promise

    @torch.inference_mode(False)  # with gradients
    def departures(self, gradient=2, distance=1):
        """Weights for `mcts.search`: a first-order guess at how well each single edit of the full-depth chain does.

        Entry [i][j] is for layer j reading the hidden states that layer i usually reads (n_layers: the final norm): for
        i < j a skip of layers i to j - 1, for i > j a loop to j. It is exp(gradient * tanh(effect)) / far ** distance.
        effect: the first-order change of promise, the gradient at layer j times the change of the states that it reads
          (attribution patching, arXiv 2310.10348); bounded, because it is unreliable for large changes.
        far: 1 - cosine similarity of the two states, mean over tokens; at least 0.001.
        Costs a forward and a backward pass of the full-depth chain, and memory for the activations of all layers.
        """
        states = [self.model.embed_tokens(self.tokens).detach().requires_grad_()]
        for layer in self.model.layers:
            states.append(layer(states[-1], self.rope))
        _, promise = self.judge(states[-1][:, self.positions])
        gradients = torch.cat(torch.autograd.grad(promise, states)).float().flatten(1)
        states = torch.cat(states).detach().float()  # [n_layers + 1, T, hidden_size]
        directions = F.normalize(states, dim=-1).flatten(1)
        far = 1 - directions @ directions.T / states.shape[1]
        effect = states.flatten(1) @ gradients.T - (states.flatten(1) * gradients).sum(1)  # (s_i - s_j) . g_j
        # States or logits that overflow give NaN.
        return ((gradient * effect.nan_to_num().tanh()).exp() / far.nan_to_num(1).clamp(min=1e-3) ** distance).tolist()

    @torch.inference_mode()
    def run(self, chains):
        """The hidden states at `positions` after each of the chains (tuples), [chains, len(positions), hidden_size]."""
        self.steps_asked += sum(map(len, chains))
        progress = {chain: self.recall(chain) for chain in chains}  # {chain: (steps done, hidden states after them)}
        while pending := {chain: steps for chain, (steps, _) in progress.items() if steps < len(chain)}:
            layer = min(chain[steps] for chain, steps in pending.items())
            ready = {chain: chain[:steps + 1] for chain, steps in pending.items() if chain[steps] == layer}
            batch = {prefix: progress[chain][1] for chain, prefix in ready.items()}  # each shared prefix once
            outputs = self.model.layers[layer](torch.cat([*batch.values()]), self.rope).split(1)
            self.steps_run += len(batch)
            # Cloned, because a kept view would hold its whole batch in memory.
            after = {prefix: states.clone() for prefix, states in zip(batch, outputs)}
            progress |= {chain: (len(prefix), after[prefix]) for chain, prefix in ready.items()}
            self.states |= after
            while len(self.states) > self.max_states:
                self.states.popitem(last=False)
        return torch.cat([progress[chain][1][:, self.positions] for chain in chains])

    def recall(self, chain):
        """The longest prefix of a chain whose states are kept: its length, and the states, [1, T, hidden_size]."""
        for steps in range(len(chain), 0, -1):
            if chain[:steps] in self.states:
                self.states.move_to_end(chain[:steps])
                return steps, self.states[chain[:steps]]
        return 0, self.model.embed_tokens(self.tokens)


def fetch(path_or_repo, revision=None):
    """The folder of a checkpoint: the one given, or the one in the hub's cache, after fetching what it lacks."""
    if Path(path_or_repo).exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path_or_repo)):
        if revision is not None:
            raise ValueError(f"{path_or_repo} is not a repository on the hub and has no revisions; omit --revision")
        if not (Path(path_or_repo) / "config.json").is_file():
            raise FileNotFoundError(f"{path_or_repo} is neither a folder with a config.json nor an org/name on the hub")
        return Path(path_or_repo)
    # Patterns that begin with "*" would match copies of the weights in sub-folders and in other layouts.
    return Path(snapshot_download(str(path_or_repo), revision=revision, allow_patterns=[
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "chat_template.jinja", "model.safetensors.index.json", "model*.safetensors"]))


def weight_files(path):
    """The paths of the checkpoint's safetensors: the single file or, without it, those that the index names."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single]
    try:
        return [path / name for name in sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of weights ({error!r}); fetch the checkpoint again") from None
