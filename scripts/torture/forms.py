"""Checkpoints in forms that people have, drawn at random: each equals what transformers loads, or is refused clearly.

    python -m scripts.torture.forms --times 500

Prefix x wrapper x dtypes x head x buffers x strides x cut into shards x container, and now and then something that is
wrong. transformers reads the same tensors from the plainest form that it takes.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from runner.errors import BloomdeskError
from runner.format.manifest import load_manifest
from scripts.fakehub.checkpoint import Layout, synthetic
from toolkit.commands.convert import convert
from toolkit.commands.verify import verify

SHAPE = {"hidden_size": 32, "heads": 4, "blocks": 2, "vocab_size": 290}
MATRIX, HEAD = "word_embeddings.weight", "lm_head.weight"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Form:
    """How a checkpoint is stored; `wrong` is what is broken in it, or ""."""

    prefix: str
    wrapper: str
    dtypes: str
    said: str | None
    head: str
    buffers: bool
    strides: bool
    shards: int
    container: str
    protocol: int
    wrong: str


def draw(chance: random.Random) -> Form:
    """Any form that can be."""
    container = chance.choice(("safetensors", "bin"))
    shards = chance.choice((1, 1, 2, 3, 7))
    wrappers = ["", "", "module."]
    if container == "bin" and shards == 1:
        wrappers += ["under model", "under state_dict", "under module", "beside a training state"]
    prefix = chance.choice(("", "transformer.", "some"))
    return Form(
        prefix=prefix,
        wrapper=chance.choice(wrappers),
        dtypes=chance.choice((*DTYPES, *DTYPES, "layernorms f32", "any")),
        # Unsaid, the dtype is that of the first key in order, and transformers does not read a mixture of prefixes.
        said=chance.choice((*([None] if prefix != "some" else []), *DTYPES)),
        head=chance.choice(("none", "none", "again", "alone", "own, said", "own, unsaid")),
        buffers=chance.random() < 0.3,
        strides=container == "bin" and chance.random() < 0.3,
        shards=shards,
        container=container,
        protocol=chance.choice((2, 3, 4, 5)),
        wrong=chance.choice((*[""] * 15, "missing", "unknown", "shape", "cut", "integers")),
    )


def state_of(form: Form, base: State, chance: random.Random) -> State:
    """The tensors, by their plain names, in the order of the file."""
    state: State = {}
    for key, tensor in base.items():
        name = form.dtypes
        if name == "any":
            name = chance.choice(tuple(DTYPES))
        elif name == "layernorms f32":
            name = "f32" if "layernorm" in key or key.startswith("ln_f") else "f16"
        state[key] = tensor.to(DTYPES[name])
    if form.head == "again":
        state[HEAD] = state[MATRIX].clone()
    elif form.head == "alone":
        state[HEAD] = state.pop(MATRIX)
    elif form.head.startswith("own"):
        state[HEAD] = (state[MATRIX].float() * 2 - 0.25).to(state[MATRIX].dtype)
    if form.wrong == "missing":
        state.pop("h.1.mlp.dense_h_to_4h.bias")
    elif form.wrong == "unknown":
        state["h.1.mlp.gate.weight"] = torch.ones(3)
    elif form.wrong == "shape":
        state["ln_f.weight"] = state["ln_f.weight"][:-1].clone()
    elif form.wrong == "integers":
        state["ln_f.bias"] = state["ln_f.bias"].to(torch.int8)
    return state


def write(directory: Path, form: Form, state: State, small: Path, chance: random.Random) -> Path:
    """The checkpoint in this form."""
    shutil.copytree(small, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((directory / "config.json").read_text())
    for name in ("dtype", "torch_dtype", "tie_word_embeddings"):
        config.pop(name, None)
    if form.said:
        config["torch_dtype"] = NAMES[form.said]
    if form.head == "own, said":
        config["tie_word_embeddings"] = False
    (directory / "config.json").write_text(json.dumps(config))
    named: dict[str, torch.Tensor] = {}
    for number, (key, tensor) in enumerate(state.items()):
        prefix = (
            "transformer." if form.prefix == "some" and number % 3 == 0 else form.prefix.replace("some", "")
        )
        named[key if key == HEAD else prefix + key] = tensor
    if form.buffers:
        for block in range(SHAPE["blocks"]):
            named[f"{form.prefix.replace('some', '')}h.{block}.self_attention.masked_bias"] = torch.tensor(
                -1e4
            )
    if form.wrapper == "module.":
        named = {f"module.{key}": tensor for key, tensor in named.items()}
    if form.strides:
        named = {
            key: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for key, tensor in named.items()
        }
    keys, suffix = list(named), "safetensors" if form.container == "safetensors" else "bin"
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    cuts = sorted(chance.sample(range(1, len(keys)), form.shards - 1))
    pieces = [keys[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(keys)], strict=True)]
    weight_map = {}
    for number, piece in enumerate(pieces, 1):
        many = f"{stem}-{number:05d}-of-{len(pieces):05d}.{suffix}"
        file = directory / (f"{stem}.{suffix}" if len(pieces) == 1 else many)
        weight_map.update(dict.fromkeys(piece, file.name))
        tensors = {key: named[key] for key in piece}
        if suffix == "safetensors":
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, {"format": "pt"})
        else:
            torch.save(wrapped(form, tensors), file, pickle_protocol=form.protocol)
    if len(pieces) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    if form.wrong == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    return directory


def wrapped(form: Form, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What a training script saves around the tensors."""
    if form.wrapper.startswith("under "):
        return {form.wrapper.removeprefix("under "): tensors}
    if form.wrapper == "beside a training state":
        return {"epoch": 3, "optimizer": {"lr": 0.1}, "model": tensors}
    return dict(tensors)


def plainest(form: Form) -> Form:
    """The form of the same tensors that transformers reads, too: the order and the files stay."""
    return replace(
        form,
        prefix=form.prefix.replace("some", "transformer."),
        wrapper="",
        buffers=False,
        strides=False,
        protocol=2,
    )


def loaded(source: Path) -> State:
    """What transformers makes of a checkpoint, by plain names; AssertionError if it does not find all of it."""
    from transformers import BloomForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model, info = BloomForCausalLM.from_pretrained(source, dtype="auto", output_loading_info=True)
    assert not info["mismatched_keys"], info
    return {key.removeprefix("transformer."): tensor for key, tensor in model.state_dict().items()}


def prepared(directory: Path) -> State:
    """The tensors of a prepared directory, by plain names."""
    from toolkit.source.key_map import name_table

    manifest = load_manifest(directory)
    places = {place: name for name, place in name_table(manifest.model).items()}
    found = {}
    for file in manifest.parts:
        found |= {places[file, name]: tensor for name, tensor in load_file(directory / file).items()}
    return found


def attempt(
    seed: int, directory: Path, base: State, small: Path, load: Callable[[Path], State] = loaded
) -> str:
    """What came of the form that `seed` draws: "equal" or "refused"; AssertionError if it is neither."""
    form = draw(random.Random(seed))
    state = state_of(form, base, random.Random(seed))
    source = write(directory / "source", form, state, small, random.Random(seed))
    try:
        convert(source, directory / "bloom")
    except BloomdeskError as error:
        assert form.wrong, f"{form}: refused: {error.message}"
        assert "\n" not in error.message and len(error.message) < 600, f"{form}: {error.message}"
        return "refused"
    assert not form.wrong, f"{form}: accepted"
    assert verify(directory / "bloom").sound, f"{form}: not sound"
    plain = write(directory / "plain", plainest(form), state, small, random.Random(seed))
    wanted, found = load(plain), prepared(directory / "bloom")
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype, (
            f"{form}: {name} is {tensor.dtype}, not {wanted[name].dtype}"
        )
        assert torch.equal(tensor, wanted[name]), f"{form}: {name} differs"
    assert torch.equal(found.get(HEAD, found[MATRIX]), wanted[HEAD]), f"{form}: the head differs"
    return "equal"


def make_base(directory: Path) -> tuple[State, Path]:
    """Random weights in float32, by plain names, and a directory with the small files."""
    small = directory / "small"
    synthetic(small, **SHAPE, dtype="float32", layout=Layout(single=True, form="safetensors"))
    return load_file(small / "model.safetensors"), small


def main() -> None:
    """Try forms; exit status 1 if one is neither equal nor refused."""
    parser = argparse.ArgumentParser(
        description="Convert checkpoints of any form; compare with transformers."
    )
    parser.add_argument("--times", type=int, default=500, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        base, small = make_base(Path(place))
        for number in range(given.times):
            directory = Path(place) / str(number)
            try:
                counts[attempt(given.seed * 10**6 + number, directory, base, small)] += 1
            except AssertionError as error:
                counts["FAILED"] += 1
                print(f"FAILED {error}", flush=True)
            shutil.rmtree(directory, ignore_errors=True)
    print(json.dumps(counts))
    sys.exit(bool(counts["FAILED"]))


if __name__ == "__main__":
    main()
