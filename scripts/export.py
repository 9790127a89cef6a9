"""Writes a chain of layers as an ordinary Hugging Face checkpoint, whose layers are the chain's steps in order.

    python -m scripts.export --chain 0-5,5,8-11 --out path/to/new
    python -m scripts.export --model org/name --chain 0-8,11-20,18-29 --out path/to/new

A layer that the chain loops is written once for each time: every step is a layer of its own, with its own keys and
values. Weights are copied unchanged, each file to one of the same name, which loops make larger. config.json is
written last: a folder without it is an interrupted export.
"""
import json
import re
import shutil
from pathlib import Path

import cola
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from model import Config, fetch, weight_files
from scripts import common
from scripts.train_tiny import save_tensors

LAYER = re.compile(r"((?:model\.)?layers\.)(\d+)(\..+)")
COPIED = "generation_config.json *token*.json tokenizer.model vocab.json merges.txt *.jinja LICENSE* NOTICE*".split()
CARD = """---
{base}library_name: transformers
pipeline_tag: text-generation
---
# {name}

The layers of {source} in the order `{chain}`, counted from 0. It has {steps} layers and {here:.2f} M parameters, the
source {layers} and {before:.2f} M. No weight was changed, so the source's licence holds.{note}

In transformers:

```python
from transformers import pipeline
write = pipeline("text-generation", "path/to/{name}")
print(write({prompt}, max_new_tokens=32, do_sample=False)[0]["generated_text"])
```

In llama.cpp, whose converter has to know the tokenizer:

```sh
python convert_hf_to_gguf.py path/to/{name} --outtype f32 --outfile {name}.gguf
llama-completion -m {name}.gguf {option} -p "{text}" -n 32 --temp 0
```

In vLLM:

```python
from vllm import LLM, SamplingParams
if __name__ == "__main__":  # vLLM starts processes of its own
    model = LLM("path/to/{name}")
    print(model.{method}({prompt}, SamplingParams(temperature=0, max_tokens=32))[0].outputs[0].text)
```

Written by scripts/export.py of a reference implementation of CoLa, chains of layers (arXiv 2507.07996).
"""
# How the card asks a base model, and one with a chat template.
PLAIN = {"prompt": r'"Question: What is 12 + 7?\nAnswer:"', "text": r"Question: What is 12 + 7?\nAnswer:",
         "option": "-no-cnv", "method": "generate"}
CHAT = {"prompt": '[{"role": "user", "content": "What is 12 + 7?"}]', "text": "What is 12 + 7?",
        "option": "-st", "method": "chat"}


def new_names(name, chain):
    """The names under which a tensor is written: one for each step that runs its layer."""
    match = LAYER.fullmatch(name)
    if not match:
        return [name]
    return [f"{match[1]}{step}{match[3]}" for step, layer in enumerate(chain) if layer == int(match[2])]


def adapt(raw, config, chain, names):
    """The source's config.json for the chain, whose tensors have these names."""
    new = raw | {"num_hidden_layers": len(chain)}
    new.pop("_name_or_path", None)  # a place on its author's machine
    for key, value in raw.items():
        if "layer" in key and isinstance(value, list) and len(value) == config.num_hidden_layers:
            new[key] = [value[layer] for layer in chain]
    if raw["model_type"].endswith("_moe"):  # a layer's number said whether it has experts; now its tensors do
        sparse = [LAYER.fullmatch(name)[2] for name in names if name.endswith(".mlp.gate.weight")]
        new["mlp_only_layers"] = [step for step in range(len(chain)) if str(step) not in sparse]
        new["decoder_sparse_step"] = 1
    if raw.get("use_sliding_window") and not raw.get("layer_types"):  # numbers again; up to the window none does
        new |= {"use_sliding_window": False, "max_position_embeddings": config.max_position_embeddings}
    return new


def copy_weights(file, out, chain):
    """Writes what the chain needs of one file; returns the file's tensors and the written ones, {name: tensor}.

    These are views of the file on the disk, so that neither it nor its loops are ever in memory as a whole.
    """
    try:
        stored = safe_open(file, framework="pt")
        old = {name: stored.get_tensor(name) for name in stored.keys()}
        new = {name: tensor for old_name, tensor in old.items() for name in new_names(old_name, chain)}
        if new:  # else the chain skips all that the file holds
            save_tensors(new, out / file.name, **{"format": "pt"} | (stored.metadata() or {}))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is incomplete, or {out} has no space left ({error}); fetch the file "
                         "again, or free some space") from None
    return old, new


def source(model, revision=None):
    """The folder of the checkpoint to export from."""
    return fetch(cola.TINY if model == "tiny" else model, revision)


def new_folder(out, folder):
    """The folder to export to, made if need be. Raises ValueError unless it is new or empty, and outside the source."""
    out = Path(out)
    if folder.resolve() in out.resolve().parents:
        raise ValueError(f"{out} is inside the source checkpoint {folder}; give another folder")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} must be a new or an empty folder; remove it or give another")
    common.make_folder(out)
    return out


def export(model, chain, out, revision=None, note=""):
    """Does what the command does; `note` is a sentence for the model card, such as how the chain was found.

    Raises ValueError or OSError with one line that says what to do.
    """
    folder = source(model, revision)
    config = Config.from_json(folder / "config.json")
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers, chain = config.num_hidden_layers, cola.parse_chain(chain, config.num_hidden_layers)
    if not chain:
        raise ValueError("other programs cannot run a model without layers; give --chain at least one")
    out = new_folder(out, folder)
    places, before, here, size = {}, 0, 0, 0
    for file in tqdm(weight_files(folder), desc="export", unit="file", disable=None, leave=False):
        old, new = copy_weights(file, out, chain)
        places |= dict.fromkeys(new, file.name)
        before += sum(tensor.numel() for tensor in old.values())
        here += sum(tensor.numel() for tensor in new.values())
        size += sum(tensor.nbytes for tensor in new.values())
    if len({LAYER.fullmatch(name)[2] for name in places if LAYER.fullmatch(name)}) < len(chain):
        raise ValueError(f"{folder} lacks the tensors of a layer; fetch the checkpoint again")
    if (folder / "model.safetensors.index.json").exists():
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for file in {file for pattern in COPIED for file in folder.glob(pattern) if file.is_file()}:
        shutil.copyfile(file, out / file.name)
    name, hub = folder.resolve().name, None if folder in (cola.TINY, Path(model)) else model
    chat = any(file.suffix == ".jinja" or '"chat_template"' in file.read_text(encoding="utf-8")
               for pattern in ("chat_template.jinja", "tokenizer_config.json") for file in folder.glob(pattern))
    card = CARD.format(**CHAT if chat else PLAIN, base=f"base_model: {hub}\n" if hub else "", name=out.resolve().name,
                       source=f"{hub} (revision {name})" if hub else name,  # a folder in the hub's cache is a commit
                       chain=cola.format_chain(chain), steps=len(chain),
                       here=here / 1e6, layers=layers, before=before / 1e6, note=note and f"\n\n{note}")
    (out / "README.md").write_text(card, encoding="utf-8")
    (out / "config.json").write_text(json.dumps(adapt(raw, config, chain, places), indent=2) + "\n")
    print(f"{out}: {len(chain)} layers (source: {layers}), {here / 1e6:.1f}M parameters (source: {before / 1e6:.1f}M), "
          f"{size} bytes")


def parser():
    p = cola.Parser("python -m scripts.export", __doc__)
    p.add_argument("--model", default="tiny", metavar="NAME",
                   help="a checkpoint's folder, or its org/name on the hub (default: the included tiny)")
    p.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub (default: main)")
    p.add_argument("--chain", required=True, metavar="LAYERS", help="the chain to write, such as 0-5,5,8-11")
    p.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write, new or empty")
    return p


def main(args):
    export(args.model, args.chain, args.out, args.revision)


if __name__ == "__main__":
    cola.exit_on_error("export", main, parser().parse_args())
