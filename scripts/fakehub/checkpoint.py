"""Write a BLOOM checkpoint as a Hub repo, in the form of bigscience/bloom or of its relatives.

    OUT/
      pytorch_model_00001-of-00072.bin   word_embeddings.weight, word_embeddings_layernorm.{weight,bias}
      pytorch_model_00002-of-00072.bin   the 12 tensors of block 0, and so on
      pytorch_model_00072-of-00072.bin   ln_f.{weight,bias}
      pytorch_model.bin.index.json       metadata.total_size, weight_map
      config.json                        n_embed, num_attention_heads, no dtype
      tokenizer.json, tokenizer_config.json, special_tokens_map.json

    python -m scripts.fakehub.checkpoint miniature OUT         the trained miniature that the project ships
    python -m scripts.fakehub.checkpoint miniature-draft OUT   its draft, in one safetensors file as bloom-560m
    python -m scripts.fakehub.checkpoint synthetic OUT ...     random weights of any shape, true ones included

Tensors are made and written buffer by buffer, so a true-size checkpoint needs little memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from runner.estimate.family import SHAPES as TRUE_SHAPES
from runner.estimate.family import VOCABULARY as TRUE_VOCABULARY
from runner.format.layout import block_tensors
from runner.format.safetensors import encode_header
from scripts.fakehub.bin_shard import DTYPES, Tensor, write_bin

if TYPE_CHECKING:
    from tokenizers import pre_tokenizers

MINIATURE = Path(__file__).resolve().parents[2] / "miniature"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SAFETENSORS_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
# Odd, so that repeated noise never lines up with the rows of a matrix.
BUFFER_ELEMENTS = 2**22 - 3
PRE_TOKENIZER_PATTERN = r" ?[^(\s|[.,!?…。，、।۔،])]+"


@dataclass(frozen=True)
class Layout:
    """The form that a repo has; the defaults are those of bigscience/bloom."""

    form: str = "bin"  # or "safetensors"
    single: bool = False  # one file and no index
    separator: str = "_"  # before the shard's number; most repos have "-"
    todays_zip: bool = False  # .bin as today's torch.save writes it: more records, another root folder
    prefix: bool = False  # keys start with `transformer.`
    lm_head: bool = False  # the embedding is repeated as lm_head.weight
    max_shard_bytes: int | None = None  # fill shards to this size instead of one block in each
    new_config: bool = False  # config.json as transformers 5 writes it

    def file_name(self, number: int, count: int) -> str:
        stem, suffix = ("model", "safetensors") if self.form == "safetensors" else ("pytorch_model", "bin")
        if self.single:
            return f"{stem}.{suffix}"
        return f"{stem}{self.separator}{number:05d}-of-{count:05d}.{suffix}"

    @property
    def index_name(self) -> str:
        return f"{'model.safetensors' if self.form == 'safetensors' else 'pytorch_model.bin'}.index.json"


BLOOM = Layout()


def synthetic(
    out: Path,
    *,
    hidden_size: int,
    heads: int,
    blocks: int,
    vocab_size: int,
    dtype: str = "bfloat16",
    seed: int = 0,
    normal_embedding: bool = False,
    layout: Layout = BLOOM,
) -> None:
    """Write a BLOOM of any shape with random weights; the same arguments always give the same bytes.

    The weights are scaled so that greedy output changes from token to token. With `normal_embedding` that holds
    less strictly, and the embedding's exponents spread as those of all other matrices do: without it a coder of
    exponents would have almost nothing to code in the embedding.
    """
    shapes = bloom_shapes(hidden_size, blocks, vocab_size)
    tensors = []
    for key, shape in shapes.items():
        scaled = partial(_as_weights, key, hidden_size, normal_embedding)
        tensors.append(_random_tensor(key, shape, DTYPES[dtype], seed, scaled))
    config = old_config(hidden_size, heads, blocks, vocab_size)
    write_repo(out, tensors, config, _tokenizer_for(vocab_size), layout)


def miniature(out: Path, *, layout: Layout = BLOOM, source: Path = MINIATURE) -> None:
    """Write the trained miniature; its weights come from `source`, as does its tokenizer if `source` has one."""
    from safetensors import safe_open

    with safe_open(source / "model.safetensors", framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    places = {name: source if (source / name).is_file() else MINIATURE for name in TOKENIZER_FILES}
    tokenizer = {name: (place / name).read_bytes() for name, place in places.items()}
    write_repo(out, from_state(state), config, tokenizer, layout)


def draft(out: Path) -> None:
    """Write the miniature's draft: a shallow model with the same tokenizer."""
    miniature(out, layout=Layout(form="safetensors", single=True), source=MINIATURE / "draft")


def from_state(state: Mapping[str, torch.Tensor]) -> list[Tensor]:
    """Tensors to write from a state dict in memory, in BLOOM's order; keys as bigscience/bloom has them."""

    values = ((key, state[key]) for key in sorted(state, key=_place))
    return [Tensor(key, v.dtype, tuple(v.shape), lambda v=v: [_bytes_of(v)]) for key, v in values]


def write_repo(
    out: Path,
    tensors: Sequence[Tensor],
    config: Mapping[str, Any],
    tokenizer: Mapping[str, bytes],
    layout: Layout = BLOOM,
) -> None:
    """Write the repo: shards, index, config and the tokenizer's files; `tensors` in BLOOM's order."""
    out.mkdir(parents=True, exist_ok=True)
    if layout.prefix:
        tensors = [replace(tensor, key=f"transformer.{tensor.key}") for tensor in tensors]
    if layout.lm_head:
        tensors = [*tensors, replace(tensors[0], key="lm_head.weight")]
    shards = _split(tensors, layout)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = layout.file_name(number, len(shards))
        _write_shard(out / name, shard, layout)
        weight_map.update({tensor.key: name for tensor in shard})
    if not layout.single:
        total = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(out / layout.index_name, index)
    if layout.new_config:
        config = _in_new_form(config, tensors[0].dtype)
    write_json(out / "config.json", config)
    for name, data in tokenizer.items():
        (out / name).write_bytes(data)


def to_lfs_clone(directory: Path) -> None:
    """Turn a repo into a clone without smudged files: a pointer for each large one, its bytes in .git/lfs/objects."""
    for path in sorted(directory.iterdir()):
        if path.name != "tokenizer.json" and path.suffix not in (".bin", ".safetensors"):
            continue
        data = path.read_bytes()
        oid = hashlib.sha256(data).hexdigest()
        place = directory / ".git" / "lfs" / "objects" / oid[:2] / oid[2:4] / oid
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n"
        path.write_text(pointer, encoding="utf-8")


def bloom_shapes(hidden_size: int, blocks: int, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Every key of a BLOOM and its shape, in the order of the checkpoint."""
    norm = {"weight": (hidden_size,), "bias": (hidden_size,)}
    return {
        "word_embeddings.weight": (vocab_size, hidden_size),
        **{f"word_embeddings_layernorm.{name}": shape for name, shape in norm.items()},
        **{
            f"h.{i}.{name}": shape
            for i in range(blocks)
            for name, shape in block_tensors(hidden_size).items()
        },
        **{f"ln_f.{name}": shape for name, shape in norm.items()},
    }


def old_config(hidden_size: int, heads: int, blocks: int, vocab_size: int) -> dict[str, Any]:
    """config.json in the form that bigscience/bloom has."""
    return {
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "architectures": ["BloomModel"],
        "attention_softmax_in_fp32": True,
        "pad_token_id": 3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "masked_softmax_fusion": True,
        "model_type": "bloom",
        "n_embed": hidden_size,
        "n_layer": blocks,
        "num_attention_heads": heads,
        "pretraining_tp": 4,
        "slow_but_exact": False,
        "transformers_version": "4.21.0",
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def pre_tokenizer() -> pre_tokenizers.Sequence:
    """BLOOM's pre-tokenizer: its pattern, then bytes."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(PRE_TOKENIZER_PATTERN), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_tokenizer(vocab_size: int) -> dict[str, bytes]:
    """The files of a tokenizer in BLOOM's layout that knows single bytes; at most `vocab_size` entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    names = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())][:vocab_size]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.add_special_tokens(specials[:vocab_size])
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    special_map = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    settings = {**special_map, "tokenizer_class": "BloomTokenizerFast", "padding_side": "left"}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "special_tokens_map.json": json.dumps(special_map).encode(),
    }


def _tokenizer_for(vocab_size: int) -> dict[str, bytes]:
    """The miniature's tokenizer if it fits into `vocab_size`, or one of single bytes."""
    if all((MINIATURE / name).is_file() for name in TOKENIZER_FILES):
        files = {name: (MINIATURE / name).read_bytes() for name in TOKENIZER_FILES}
        if len(json.loads(files["tokenizer.json"])["model"]["vocab"]) <= vocab_size:
            return files
    return byte_tokenizer(vocab_size)


def _in_new_form(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    renamed = {"n_embed": "hidden_size", "num_attention_heads": "n_head"}
    new = {renamed.get(name, name): value for name, value in config.items()}
    dtype_name = str(dtype).removeprefix("torch.")
    extra = {"architectures": ["BloomForCausalLM"], "dtype": dtype_name, "transformers_version": "5.23.0"}
    return dict(sorted({**new, **extra, "tie_word_embeddings": True}.items()))


def _place(key: str) -> tuple[int, int, int]:
    """The position of a key in the checkpoint: embedding, blocks by number, final LayerNorm, the rest."""
    order = {name: place for place, name in enumerate(bloom_shapes(1, 1, 1))}
    block = int(key.split(".")[1]) if key.startswith("h.") else -1
    place = order.get(f"h.0.{key.split('.', 2)[2]}" if block >= 0 else key, len(order))
    return (0 if place < 3 else 2 if block < 0 else 1, block, place)


def _random_tensor(
    key: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    seed: int,
    scaled: Callable[[torch.Tensor], torch.Tensor],
) -> Tensor:
    def buffers() -> Iterator[memoryview]:
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode(), seed & 0xFFFFFFFF))
        count = math.prod(shape)
        noise = torch.randn(min(count, BUFFER_ELEMENTS), generator=generator)
        buffer = _bytes_of(scaled(noise).to(dtype))
        for start in range(0, count, BUFFER_ELEMENTS):
            yield buffer[: (count - start) * dtype.itemsize]

    return Tensor(key, dtype, shape, buffers)


def _as_weights(key: str, hidden: int, normal_embedding: bool, noise: torch.Tensor) -> torch.Tensor:
    """Weights from standard normal noise, scaled so that greedy output changes from token to token.

    With a tied head and plain small noise, each token's own embedding wins the next step and one token comes
    repeats. Here the embedding's entries are nearly +-0.02 and every other feature changes its sign after the
    lookup, so that a token's score for itself cancels out; the blocks' weights let the context matter.
    """
    if key.endswith("bias"):
        return noise * 0.02
    if key == "word_embeddings.weight":
        return noise * 0.02 if normal_embedding else noise.sign() * (0.018 + 0.002 * noise.abs())
    if "layernorm" in key or key.startswith("ln_f"):
        weight = 1.0 + 0.05 * noise
        if key.startswith("word_embeddings"):
            weight[1::2] *= -1
        return weight
    return noise * ((1.0 if "self_attention" in key else 0.5) / math.sqrt(hidden))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


def _split(tensors: Sequence[Tensor], layout: Layout) -> list[list[Tensor]]:
    """Tensors by shard: everything, filled to a size, or one block in each."""
    if layout.single:
        return [list(tensors)]
    shards: list[list[Tensor]] = []
    previous = None
    for tensor in tensors:
        key = tensor.key.removeprefix("transformer.")
        group = _place(key)[:2] if key != "lm_head.weight" else previous
        new = not shards or group != previous
        if layout.max_shard_bytes is not None and shards:
            new = sum(t.nbytes for t in shards[-1]) + tensor.nbytes > layout.max_shard_bytes
        shards += [[]] if new else []
        shards[-1].append(tensor)
        previous = group
    return shards


def _write_shard(path: Path, tensors: Sequence[Tensor], layout: Layout) -> None:
    if layout.form == "safetensors":
        write_safetensors(path, tensors)
    elif layout.todays_zip:
        state = OrderedDict()
        for tensor in tensors:
            data = bytearray().join(tensor.buffers())
            state[tensor.key] = torch.frombuffer(data, dtype=tensor.dtype).reshape(tensor.shape)
        torch.save(state, path)
    else:
        write_bin(path, tensors)


def write_safetensors(path: Path, tensors: Sequence[Tensor]) -> None:
    """Write a safetensors file as the reference library does: tensors by name, header padded to 8 bytes."""
    ordered = sorted(tensors, key=lambda tensor: tensor.key)
    header = encode_header((tensor.key, SAFETENSORS_NAMES[tensor.dtype], tensor.shape) for tensor in ordered)
    with path.open("wb") as file:
        file.write(header)
        for tensor in ordered:
            file.writelines(tensor.buffers())


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a BLOOM checkpoint in the Hub's layout.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("miniature", "miniature-draft", "synthetic"):
        command = commands.add_parser(name)
        command.add_argument("out", type=Path, metavar="OUT")
    command.add_argument("--single", action="store_true", help="one file, no index")
    command.add_argument("--like", choices=TRUE_SHAPES, help="the shape of a real model")
    for name in ("hidden-size", "heads", "blocks", "vocab-size"):
        command.add_argument(f"--{name}", type=int, metavar="N")
    command.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--normal-embedding", action="store_true", help="exponents as in trained weights")
    given = vars(parser.parse_args(arguments))
    if given["command"] == "synthetic":
        defaults = *TRUE_SHAPES.get(given["like"], (64, 8, 2)), TRUE_VOCABULARY if given["like"] else 512
        names = ("hidden_size", "heads", "blocks", "vocab_size")
        shape = {name: given[name] or value for name, value in zip(names, defaults, strict=True)}
        options = {name: given[name] for name in ("dtype", "seed", "normal_embedding")}
        synthetic(given["out"], **shape, **options, layout=Layout(single=given["single"]))
    else:
        write = miniature if given["command"] == "miniature" else draft
        write(given["out"])
    print(f"wrote {given['out']}")


if __name__ == "__main__":
    main()
