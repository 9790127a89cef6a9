"""A Llama-style decoder whose layers can be applied in any order, any number of times.

A *chain* is a list of layer indices. `Llama.forward(tokens, chain)` applies those layers from left to right
between the embedding and the final norm: an index left out is a layer skipped, an index repeated is a layer looped.

References: CoLa, arXiv 2507.07996 (chains of layers); Llama 2, arXiv 2307.09288 (the architecture);
RoPE, arXiv 2104.09864; grouped-query attention, arXiv 2305.13245; speculative decoding, arXiv 2211.17192 (`Verifier`).
"""
import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import functional as F


@dataclass
class Config:
    """The part of a Hugging Face config.json that the decoder needs, under the same names."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    eos_token_id: int | list | None = None  # one, several or no tokens that end a text

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, path):
        """Reads config.json. Raises ValueError for anything that this decoder would compute wrongly."""
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; give the folder of a checkpoint in the Hugging Face layout")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}); fetch the checkpoint again") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{path} holds no JSON object; fetch the checkpoint again")
        # transformers 5 writes rope_parameters; older checkpoints hold rope_theta and rope_scaling.
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        raw.setdefault("rope_theta", rope.get("rope_theta"))
        for name, found, supported in [("model_type", raw.get("model_type"), "llama"),
                                       ("hidden_act", raw.get("hidden_act", "silu"), "silu"),
                                       ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
                                       ("quantization_config", raw.get("quantization_config"), None)]:
            if found != supported:
                raise ValueError(f"{path}: {name} {found!r} is not supported, only {supported!r} is; "
                                 "take another checkpoint")
        try:
            config = cls(**{field.name: raw[field.name] for field in fields(cls) if raw.get(field.name) is not None})
            if min(config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers,
                   config.num_attention_heads // config.num_key_value_heads, config.head_dim) < 1:
                raise TypeError("sizes must be 1 or more")
        except (TypeError, ZeroDivisionError) as error:
            raise ValueError(f"{path} does not describe a decoder ({error}); fetch the checkpoint again") from None
        return config


class KVCache:
    """Keys and values of past tokens, one slot for each step of the chain.

    A looped layer reads different hidden states each time round, so its keys and values differ each time round too:
    slot i belongs to the i-th step of the chain, whichever layer runs there. One cache serves one chain.

    Attributes:
      length: number of tokens held.
      slots: list with a pair (keys, values) for each step, each [B, key/value heads, length, head_dim].
    """

    def __init__(self):
        self.length, self.chain, self.slots = 0, None, []

    def append(self, step, k, v):
        """Adds the keys and values of new tokens to one slot; returns all that the slot then holds."""
        if step == len(self.slots):
            self.slots.append((k, v))
        else:
            past_k, past_v = self.slots[step]
            self.slots[step] = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
        return self.slots[step]


class RMSNorm(nn.Module):
    """x / rms(x), scaled by a learned weight; computed in float32 as the published checkpoints expect."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def rope_table(config, length, device):
    """cos and sin of every position's angles, each [length, head_dim] in float32 (RoPE, section 3.2.2)."""
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    angles = torch.outer(torch.arange(length, device=device).float(), config.rope_theta ** -exponents)
    angles = torch.cat((angles, angles), dim=-1)  # Llama checkpoints rotate the two halves of a head, not neighbours
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turns each head of x [B, heads, T, head_dim] by its position's angles."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class Attention(nn.Module):
    """Causal attention in which several query heads share one key/value head."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, x, rope, mask=None, cache=None, step=None):
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, T, head_dim]
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(step, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1,
                                           enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: a gated feed-forward network."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One module of a chain. It adds to the hidden state, which is why skipping or looping it can make sense."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, *context):
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The decoder. Parameters are named as in a Hugging Face checkpoint, less the leading "model."."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.rope = None

    @classmethod
    def from_pretrained(cls, path, device=None, dtype=None):
        """Loads a checkpoint in the Hugging Face layout: config.json and one or several .safetensors files.

        Args:
          path: folder of the checkpoint.
          device: "cpu", "cuda", "cuda:1", ...; None takes the GPU if there is one.
          dtype: torch.dtype; None means bfloat16 on a GPU, float32 on the CPU.
        Raises ValueError, or OSError for a missing file, with one line that says what to do.
        """
        path = Path(path)
        device = find_device(device)
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        with torch.device("meta"):  # shapes only: the parameters are the tensors read below, held once
            model = cls(Config.from_json(path / "config.json"))
        expected = {name: parameter.shape for name, parameter in model.named_parameters()}
        weights = {}
        for file in weight_files(path):
            try:
                with safe_open(file, framework="pt", device=str(device)) as tensors:
                    for full_name in tensors.keys():
                        name = full_name.removeprefix("model.")
                        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and name not in expected):
                            continue  # derived from the config, or a copy of the tied embedding
                        tensor = tensors.get_tensor(full_name)
                        if tensor.shape != expected.get(name):
                            raise ValueError(f"{file}: tensor {full_name} has shape {list(tensor.shape)}, config.json "
                                             f"asks for {list(expected.get(name, [])) or 'no such tensor'}")
                        if not all(extreme.isfinite() for extreme in tensor.aminmax()):  # NaN spreads to both
                            raise ValueError(f"{file}: tensor {full_name} holds NaN or infinity")
                        weights[name] = tensor.to(dtype)
            except SafetensorError as error:
                raise ValueError(f"{file} is not a whole safetensors file ({error}); fetch it again") from None
        missing = sorted(expected.keys() - weights.keys())
        if missing:
            raise ValueError(f"{path} lacks {len(missing)} tensors that config.json asks for, {missing[0]} first; "
                             "fetch the checkpoint again")
        model.load_state_dict(weights, strict=False, assign=True)
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        return model.eval()

    def rotary(self, start, end, like):
        """cos and sin of positions start..end-1 in the device and dtype of the hidden states `like`."""
        if self.rope is None or len(self.rope[0]) < end or self.rope[0].device != like.device:
            self.rope = rope_table(self.config, 1 << end.bit_length(), like.device)
        return tuple(table[start:end].to(like.dtype) for table in self.rope)

    def hidden(self, tokens, chain=None, cache=None):
        """Normalized last hidden states [B, T, hidden_size]; arguments as for `forward`."""
        chain = check_chain(range(len(self.layers)) if chain is None else chain, len(self.layers))
        past, new = 0 if cache is None else cache.length, tokens.shape[1]
        if new == 0:
            raise ValueError("there are no tokens to run; give at least one")
        if past + new > self.config.max_position_embeddings:
            raise ValueError(f"{past + new} tokens are more than the model's {self.config.max_position_embeddings} "
                             "positions; use a shorter prompt")
        if cache is not None:
            if cache.chain not in (None, chain):
                raise ValueError(f"this cache holds chain {list(cache.chain)}; make a new KVCache for {list(chain)}")
            cache.chain, cache.length = chain, past + new
        x = self.embed_tokens(tokens)
        rope = self.rotary(past, past + new, x)
        mask = None  # without past tokens, or with one new token, attention needs none
        if past and new > 1:
            mask = torch.ones(new, past + new, dtype=torch.bool, device=x.device).tril(past)
        for step, layer in enumerate(chain):
            x = self.layers[layer](x, rope, mask, cache, step)
        return self.norm(x)

    def forward(self, tokens, chain=None, cache=None):
        """Logits of the token after each position.

        Args:
          tokens: ids [B, T]; with a cache, only those that it does not hold yet.
          chain: layer indices in order of application, any number of each, maybe none; None means every layer once.
          cache: a KVCache that holds the earlier tokens under this same chain, and takes these in.
        Returns logits [B, T, vocab_size].
        Raises ValueError for a layer that the model does not have, or more tokens than it has positions.
        """
        return self.lm_head(self.hidden(tokens, chain, cache))

    @torch.inference_mode()
    def generate(self, tokens, chain=None, max_new_tokens=32, stop=()):
        """Greedy decoding: a list of prompt ids to the list of new ids, without the `stop` token that ended it."""
        cache, new = KVCache(), []
        step = torch.tensor([tokens], device=self.lm_head.weight.device)
        while len(new) < max_new_tokens and len(tokens) + len(new) <= self.config.max_position_embeddings:
            token = self.lm_head(self.hidden(step, chain, cache)[0, -1]).argmax().item()
            if token in stop:
                break
            new.append(token)
            step = step.new_tensor([[token]])
        return new


class Verifier:
    """Says of any chain whether greedy decoding under it would answer right, in one forward pass.

    As in speculative decoding, the answer is a draft: run on prompt + answer, the chain would have written each of the
    answer's tokens if and only if each is the argmax after those before it. There is no decoding loop and no cache.

    Args:
      model: a Llama.
      prompt, answer: lists of token ids.
      stop: ids one of which must follow the answer; None where an answer is complete as it stands.
    """

    def __init__(self, model, prompt, answer, stop=None):
        self.model, self.n_prompt = model, len(prompt)
        device = model.lm_head.weight.device
        self.tokens = torch.tensor([[*prompt, *answer]], device=device)
        self.answer = torch.tensor(answer, dtype=torch.long, device=device)
        self.stop = stop

    @torch.inference_mode()
    def __call__(self, chains):
        """A list of chains to a list of bool."""
        return [self.verify(chain) for chain in chains]

    def verify(self, chain):
        x = self.model.hidden(self.tokens, chain)[0, self.n_prompt - 1:]
        greedy = self.model.lm_head(x).argmax(-1)
        right = torch.equal(greedy[:len(self.answer)], self.answer)
        return right and (self.stop is None or greedy[-1].item() in self.stop)


def check_chain(chain, n_layers):
    """The chain as a tuple; raises ValueError if a layer in it does not exist."""
    chain = tuple(chain)
    for layer in chain:
        if not 0 <= layer < n_layers:
            raise ValueError(f"layer {layer} does not exist; the model has layers 0 to {n_layers - 1}")
    return chain


def find_device(name=None):
    """The torch.device of that name; without a name the GPU, if there is one. Raises ValueError if it is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device {str(name)!r} is not there; use cpu" + ", or cuda" * torch.cuda.is_available()) from None
    return device


def weight_files(path):
    """The checkpoint's safetensors files: those that the index names, or the single one."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        files = ["model.safetensors"]
    else:
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{index} is not a safetensors index; fetch it again") from None
    for file in files:
        if not (path / file).is_file():
            raise FileNotFoundError(f"{path / file} is missing; a checkpoint needs its weights as safetensors")
    return [path / file for file in files]
