"""The miniature's files: weights and config as bigscience/bloom has them, its tokenizer, and prompts for judging."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from runner.format.layout import block_tensors
from scripts.fakehub.checkpoint import MINIATURE, old_config, write_json
from scripts.miniature.model import EMBEDDING_ROWS, Shape
from scripts.miniature.rows import PAD, SPECIAL
from scripts.miniature.texts import KINDS, draw_texts

TEXT_SEED = 0  # fixed, so that every model trained here gets the same tokenizer
UNSEEN_TEXTS = 150  # of each kind


def save_weights(out: Path, weights: dict[str, torch.Tensor], shape: Shape) -> None:
    """Write weights and config as the Hub has the real ones: bfloat16, no prefix, no separate head."""
    tensors = {}
    for name, value in weights.items():
        if name.startswith("h.*."):
            tensors |= {name.replace("*", str(number)): part for number, part in enumerate(value.unbind(0))}
        else:
            tensors[name] = value
    tensors = {name: value.detach().bfloat16().contiguous() for name, value in tensors.items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    write_json(out / "config.json", config_of(shape))


def save_tokenizer(out: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(out / "tokenizer.json"))
    special = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    write_json(out / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "BloomTokenizerFast", "padding_side": "left", "name_or_path": "miniature"}
    write_json(out / "tokenizer_config.json", special | settings)


def config_of(shape: Shape) -> dict[str, object]:
    """config.json with the names, and without the dtype, of bigscience/bloom's."""
    config = old_config(shape.hidden, shape.heads, shape.blocks, EMBEDDING_ROWS) | {"pretraining_tp": 1}
    return {name: value for name, value in sorted(config.items()) if name != "transformers_version"}


def write_unseen(path: Path) -> None:
    """The prompts for judging, one object a line."""
    texts = [text for kind in KINDS for text in draw_texts(kind, UNSEEN_TEXTS, TEXT_SEED, unseen=True)]
    lines = [{"kind": text.kind, "prompt": text.prompt, "answer": text.answer} for text in texts]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(content, encoding="utf-8")


def read_stacked(out: Path) -> tuple[dict[str, torch.Tensor], int]:
    """The saved weights as training has them, and the number of heads."""
    saved = {name: value.float() for name, value in load_file(out / "model.safetensors").items()}
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    weights = {name: value for name, value in saved.items() if not name.startswith("h.")}
    for name in block_tensors(config["n_embed"]):
        parts = [saved[f"h.{number}.{name}"] for number in range(config["n_layer"])]
        weights[f"h.*.{name}"] = torch.stack(parts)
    return weights, config["num_attention_heads"]


def shared_file(out: Path, name: str) -> Path:
    """The file of the model in `out`, or the miniature's if a draft has none."""
    return out / name if (out / name).exists() else MINIATURE / name


def unseen_lines(out: Path) -> list[dict[str, str]]:
    text = shared_file(out, "unseen.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def padding_tokenizer(out: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(shared_file(out, "tokenizer.json")))
    tokenizer.enable_padding(direction="left", pad_id=PAD, pad_token=SPECIAL[PAD])
    return tokenizer
