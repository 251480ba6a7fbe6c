"""One checkpoint in the form that each peer reads, and those files in the page cache or out of it.

    WORK/
      source/      the checkpoint in the Hub's layout, unless one is given
      prepared/    bloomdesk
      lossless/    bloomdesk, its matrices coded
      torch/       the tutorial's way: torch.save of each part
      hub/         transformers and AirLLM: safetensors, a shard for each block, `transformer.` before each name
      bloom.gguf   llama.cpp
      int4/, Q4_K_M.gguf   bloomdesk's and llama.cpp's four bits

What is there already is kept.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from runner.estimate.family import hyperparameters
from runner.estimate.forecast import disk_bytes
from runner.system.files import forget
from scripts.fakehub.checkpoint import TRUE_SHAPES, TRUE_VOCABULARY, synthetic

ROOT = Path(__file__).resolve().parents[3]
BUFFER = 2**23


def is_prepared(directory: Path) -> bool:
    return (directory / "manifest.backup.json").exists()


def convert(source: Path, out: Path, *flags: str) -> Path:
    """The prepared directory of a source, made if it is missing."""
    if not is_prepared(out):
        command = [sys.executable, "-m", "toolkit.cli.app", "convert", source, out, *flags]
        subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=True)
    return out


def random_weights(source: Path, shape: Sequence[int], seed: int = 0) -> Path:
    """A checkpoint of random weights; `shape` is hidden size, heads, blocks and vocabulary."""
    if not (source / "config.json").exists():  # it is written last
        names = ("hidden_size", "heads", "blocks", "vocab_size")
        synthetic(source, **dict(zip(names, shape, strict=True)), seed=seed, normal_embedding=True)
    return source


def prepared(work: Path, source: Path | None, like: str | None) -> Path:
    """The prepared directory in `work`, made from `source` or from random weights of the shapes of `like`."""
    directory = work / "prepared"
    if source is None and not is_prepared(directory):
        source = random_weights(work / "source", (*TRUE_SHAPES[like], TRUE_VOCABULARY))
    return convert(source or work / "source", directory)


def bytes_to_make(
    work: Path, prepared: Path | None, source: Path | None, like: str | None, more: Collection[str] = ()
) -> int:
    """What the disk of `work` must have free for the prepared directory and forms of these names, as far as missing.

    Every form counts as large as the weights, whose size is that of what is there, of `source` or of `like`.
    """
    directory = prepared or work / "prepared"
    is_there = is_prepared(directory)
    if is_there or source:
        one = sum(path.stat().st_size for path in files(directory if is_there else source))
    else:
        one = disk_bytes(hyperparameters(like))
    count = 0 if is_there else 1 if source else 2
    return one * (count + sum(not (work / name).exists() for name in more))


def lossless(work: Path, directory: Path) -> Path:
    """The lossless form of a prepared directory, from the source in `work` or else from its `hub` form."""
    out = work / "lossless"
    if is_prepared(out):
        return out
    return convert(
        work / "source" if (work / "source").exists() else hub(work, directory), out, "--form", "lossless"
    )


def hub(work: Path, directory: Path) -> Path:
    """A safetensors checkpoint made from a prepared directory.

    The embedding's LayerNorm has a shard of its own, since AirLLM takes whole shards as they are.
    """
    from safetensors.torch import load_file, save_file

    out = work / "hub"
    if (out / "model.safetensors.index.json").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    embedding = load_file(directory / "embedding.safetensors")
    weight = {"word_embeddings.weight": embedding.pop("word_embeddings.weight")}
    blocks = sorted(directory.glob("block_*.safetensors"))
    count, weight_map = len(blocks) + 3, {}

    def write(number: int, state: dict, prefix: str) -> None:
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        named = {f"transformer.{prefix}{name}": tensor for name, tensor in state.items()}
        save_file(named, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(named, file))

    write(1, weight, "")
    write(2, embedding, "")
    for index, path in enumerate(blocks):
        write(index + 3, load_file(path), f"h.{index}.")
    write(count, load_file(directory / "final_layernorm.safetensors"), "ln_f.")
    for path in directory.glob("*.json"):
        if not path.name.startswith("manifest"):
            shutil.copy(path, out)
    index = {"metadata": {"total_size": weights_bytes(directory)}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def torch_files(work: Path, directory: Path) -> Path:
    """A torch.save file for each part of a prepared directory."""
    import torch
    from safetensors.torch import load_file

    out = work / "torch"
    if not (out / "config.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        for path in directory.glob("*.safetensors"):
            torch.save(load_file(path), out / f"{path.stem}.pt")
        shutil.copy(directory / "config.json", out)
    return out


def gguf(work: Path, directory: Path) -> Path:
    """The GGUF file in `work`, made from a prepared directory."""
    from scripts.bench.peers.gguf_bloom import write_gguf

    out = work / "bloom.gguf"
    if not out.exists():
        write_gguf(directory, out)
    return out


def int4(work: Path, directory: Path) -> Path:
    """The int4 form of a prepared directory."""
    return convert(directory, work / "int4", "--form", "int4")


def four_bits_gguf(work: Path, directory: Path) -> Path:
    """What llama.cpp's own quantizer makes of the GGUF file in `work`."""
    out = work / "Q4_K_M.gguf"
    if not out.exists():
        from scripts.bench.peers.gguf_bloom import quantise

        quantise(gguf(work, directory), out, "Q4_K_M")
    return out


def weights_bytes(directory: Path) -> int:
    """What a pass goes through: all tensors of a prepared directory, to within the headers."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def cool(form: Path) -> float:
    """Take a form's files out of the page cache; the share of them that stayed all the same."""
    for path in files(form):
        with path.open("rb", buffering=0) as file:
            forget(file, 0, 0)
    left = cached_share(form)
    drop = Path("/proc/sys/vm/drop_caches")
    if left and os.access(drop, os.W_OK):
        drop.write_text("1")
        left = cached_share(form)
    return left


def warm(form: Path) -> None:
    """Bring a form's files into the page cache."""
    buffer = bytearray(BUFFER)
    for path in files(form):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cached_share(form: Path) -> float:
    """How much of a form's files is in the page cache, from 0 to 1; looking brings nothing in. 0 if unknown."""
    mincore = getattr(ctypes.CDLL(None), "mincore", None)
    cached, pages = 0, 0
    for path in files(form) if mincore else []:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
            flags = (ctypes.c_ubyte * -(-len(mapping) // mmap.PAGESIZE))()
            first = ctypes.c_char.from_buffer(mapping)
            mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapping)), flags)
            del first  # the mapping can't be closed while it is referred to
            cached += sum(flag & 1 for flag in bytes(flags))
            pages += len(flags)
    return cached / max(1, pages)


def files(form: Path) -> list[Path]:
    """The files of a form, which is a file or a directory; empty ones left out."""
    found = [form] if form.is_file() else sorted(path for path in form.rglob("*") if path.is_file())
    return [path for path in found if path.stat().st_size]
