"""What lies in a directory or a repo in place of the weights that bloomdesk reads, and what to fetch instead."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.layout import MANIFEST

ADAPTER = "adapter_config.json"
ORIGINAL = (
    "fetch the original model: its page has model.safetensors, pytorch_model.bin, or shards with an index"
)
# In the order in which they are said: the pattern of a file's name, and what it holds.
KINDS = (
    (re.compile(r".*\.gguf"), "weights in GGUF, quantised for llama.cpp"),
    (
        re.compile(r"gptq_model.*|quantize_config\.json|.*-gptq.*\.safetensors", re.IGNORECASE),
        "weights quantised by GPTQ",
    ),
    (re.compile(r"flax_model.*\.msgpack.*"), "weights for Flax"),
    (re.compile(r"tf_model.*\.h5.*|model\.ckpt.*"), "weights for TensorFlow"),
    (re.compile(r".*\.onnx(_data)?"), "weights for ONNX"),
)
VARIANT = re.compile(r"((?:pytorch_)?model)\.([\w-]+)((?:-\d{5}-of-\d{5})?\.(?:safetensors|bin))")
# What other downloaders leave beside a file that is not whole yet.
UNFINISHED = (".aria2", ".part", ".crdownload", ".!qB", ".st")


def what_is_there(names: Collection[str], read: Callable[[str], bytes | None]) -> tuple[str, str] | None:
    """What the files `names` are, and what to do instead, if they are of a kind that bloomdesk does not read.

    `read` gives the bytes of a small one of them.
    """
    if MANIFEST in names:
        return (
            "a prepared directory already",
            "generate from it, or write the checkpoint back: bloomdesk export",
        )
    if ADAPTER in names:
        return _adapter(read(ADAPTER))
    for name in sorted(names):
        if found := VARIANT.fullmatch(name):
            usual = found[1] + found[3]
            return (
                f"weights in the variant {found[2]} alone ({name})",
                f"fetch {usual}, which has no variant; if {name} is the one that you want, call it {usual}",
            )
    for pattern, what in KINDS:
        if found := [name for name in sorted(names) if pattern.fullmatch(name)]:
            return f"{what} ({found[0]})", ORIGINAL
    return None


def _adapter(data: bytes | None) -> tuple[str, str]:
    """An adapter alone, with the name of the model that it changes."""
    try:
        fields = json.loads(data or b"{}")
        base = str(fields["base_model_name_or_path"])[:120].encode("unicode_escape").decode()
        kind = str(fields.get("peft_type", "LORA"))[:20].encode("unicode_escape").decode()
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        base, kind = "a model that it does not name", "LORA"
    return (
        f"an adapter ({kind}) of {base}, not a whole model",
        f"fetch {base}, and merge the adapter into it: bloomdesk convert BASE DST --adapter DIR",
    )


def check_finished(shards: Iterable[Path]) -> None:
    """Raise `BloomdeskError` if another downloader has left something beside one of the `shards`."""
    for shard in shards:
        for leftover in (shard.with_name(shard.name + suffix) for suffix in UNFINISHED):
            if os.path.lexists(leftover):
                raise BloomdeskError(
                    f"{leftover} lies beside {shard.name}, so another program has not finished that file",
                    f"let it finish; if {shard.name} is whole, delete {leftover.name}",
                )
