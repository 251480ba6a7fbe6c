"""config.json of a BLOOM, in its old and new forms, as the numbers that the runner needs.

The names and defaults are those of transformers' BloomConfig, and a test compares the two. It is not used
itself: it takes seconds to import, and obeys every field of a hostile file (a `num_labels` of a billion takes
all memory).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.errors import BloomdeskError
from runner.format.hyperparameters import Hyperparameters
from toolkit.source.lfs import read_small_file

LARGEST_CONFIG = 2**20
ARCHITECTURES = ("BloomModel", "BloomForCausalLM")
# What an absent field means. The shapes have no defaults here: a BLOOM whose size is unsaid is an error.
DEFAULTS = {
    "layer_norm_epsilon": 1e-5,
    "apply_residual_connection_post_layernorm": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}
# Our name -> the names that config.json may use: new form, then old.
NAMES = {
    "hidden_size": ("hidden_size", "n_embed"),
    "n_head": ("n_head", "num_attention_heads"),
    "n_layer": ("n_layer", "num_hidden_layers"),
    "vocab_size": ("vocab_size",),
    **{name: (name,) for name in DEFAULTS},
}


def read_config(path: Path, dtype: str) -> Hyperparameters:
    """The model that the config.json at `path` describes, with the `dtype` that was found in its tensors.

    Raises `BloomdeskError` if the file can't be read, is of another architecture, needs arithmetic that
    the runner does not have, or has values that no BLOOM has.
    """
    data = read_small_file(path, LARGEST_CONFIG)
    if data is None:
        raise BloomdeskError(
            f"{path} is missing",
            "SOURCE must be a directory with config.json, tokenizer.json and the weights",
        )
    return decode_config(path, data, dtype)


def decode_config(path: Path, data: bytes, dtype: str) -> Hyperparameters:
    """The model that the bytes of a config.json describe; `path` only names it. Raises as `read_config` does."""
    config = _load(path, data)
    try:
        _check_architecture(path, config)
        values = {name: _value(path, config, name) for name in NAMES}
        if values["tie_word_embeddings"] is None:
            values["tie_word_embeddings"] = True
        values["eos_token_id"] = _ends(values["eos_token_id"])
    except RecursionError:  # what was just shallow enough to be read can be too deep to be compared or shown
        raise BloomdeskError(f"{path}: nested deeper than any config.json") from None
    try:
        return Hyperparameters(**values, dtype=dtype)
    except BloomdeskError as error:
        raise BloomdeskError(f"{path}: {error.message}") from None


def with_ends_of_text(model: Hyperparameters, path: Path, data: bytes | None) -> Hyperparameters:
    """`model` with the tokens that end a text by the bytes of a generation_config.json, which `path` only names.

    Without that file config.json decides, as it does for transformers. Raises `BloomdeskError` for impossible values.
    """
    if data is None:
        return model
    fields = json.loads(data)
    if not isinstance(fields, dict):
        raise BloomdeskError(f"{path}: not a JSON object")
    try:
        return replace(model, eos_token_id=_ends(fields.get("eos_token_id")))
    except BloomdeskError as error:
        raise BloomdeskError(f"{path}: {error.message}") from None


def _ends(value: Any) -> Any:
    """Several tokens that end a text as a tuple, one as a number."""
    if not isinstance(value, list):
        return value
    return tuple(value) if len(value) != 1 else value[0]


def _load(path: Path, data: bytes) -> dict[str, Any]:
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BloomdeskError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise BloomdeskError(f"{path}: not a JSON object")
    return config


def _check_architecture(path: Path, config: dict[str, Any]) -> None:
    kind, architectures = config.get("model_type", "bloom"), config.get("architectures")
    known = not architectures or (
        isinstance(architectures, list) and all(name in ARCHITECTURES for name in architectures)
    )
    if kind != "bloom" or not known:
        found = f"model_type {kind!r}, architectures {architectures!r}"
        raise BloomdeskError(f"{path}: not a BLOOM that bloomdesk runs: {found[:200]}")
    for name, allowed, why in (
        ("slow_but_exact", (False, None), "the runner has no slow_but_exact attention"),
        ("quantization_config", (None,), "quantised weights are not supported"),
    ):
        value = config.get(name)
        if not any(value is choice for choice in allowed):
            raise BloomdeskError(f"{path}: {name} is {repr(value)[:50]}, and {why}")


def _value(path: Path, config: dict[str, Any], name: str) -> Any:
    given = {alias: config[alias] for alias in NAMES[name] if alias in config}
    if not given:
        if name not in DEFAULTS:
            raise BloomdeskError(f"{path}: it has no {' or '.join(NAMES[name])}")
        return DEFAULTS[name]
    first, *others = given.values()
    if any(other != first for other in others):
        shown = ", ".join(repr(value)[:50] for value in given.values())
        raise BloomdeskError(f"{path}: {' and '.join(given)} disagree: {shown}")
    return first
