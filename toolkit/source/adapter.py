"""A LoRA adapter, merged into the tensors that it changes as peft's merge_and_unload does.

    ADAPTER/
      adapter_config.json                                            r, lora_alpha, ...
      adapter_model.safetensors, or .bin                             small matrices, by the module that they change:
        base_model.model.transformer.h.0.mlp.dense_h_to_4h.lora_A.weight     [r, in]
        base_model.model.transformer.h.0.mlp.dense_h_to_4h.lora_B.weight     [out, r]

    weight + (B @ A) * lora_alpha / r, the product and the sum in float32, rounded once

merge.py computes it. Source: peft/tuners/lora/layer.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from runner.errors import BloomdeskError
from toolkit.io.disk import read_if_exists, reason
from toolkit.source.key_map import LM_HEADS, MATRIX, PREFIX
from toolkit.source.shards import read_shard
from toolkit.source.tensor import Addition, SourceTensor

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
LARGEST_CONFIG = 2**20
OUTER = "base_model.model."
# What a key of an adapter ends with, after the name of the module.
SUFFIX = re.compile(r"\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B)")
# Fields of the config that a merge depends on; every other one is of training, or must be off.
USED = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "bias"}
HARMLESS = {
    "arrow_config",  # routes between several adapters
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",  # BLOOM has none of the layers that it is for
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
# Initialisations that changed the model's own weights, too.
OTHER_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
# Patterns of modules may be regular expressions; these can't take long.
PATTERN = re.compile(r"\^?(?:[\w.|-]|\\\.|\\d\+?|\(|\))+")
MERGE = "merge it with peft's merge_and_unload, save that, and convert it"


@dataclass(frozen=True)
class Adapter:
    """The adapter in the directory `path`, with its tensors by key, and the model that it was trained on."""

    path: Path
    file: Path
    base: str
    fields: Mapping[str, Any]
    tensors: Mapping[str, SourceTensor] = field(repr=False)

    @property
    def files(self) -> tuple[Path, Path]:
        """The files that a merge depends on."""
        return self.path / CONFIG, self.file

    def scaling(self, module: str, rank: int) -> float:
        """What the product is multiplied by."""
        alpha = self._of_module("alpha_pattern", "lora_alpha", module)
        if self._of_module("rank_pattern", "r", module) != rank:
            raise self._wrong(f"{module} has a product of rank {rank}, which {CONFIG} does not say")
        return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def _is_meant(self, module: str) -> bool:
        """Whether the config has peft change the module, as far as it says so without regular expressions."""
        targets, blocks = self.fields.get("target_modules"), self.fields.get("layers_to_transform")
        if isinstance(targets, list) and not any(f".{module}".endswith(f".{target}") for target in targets):
            return False
        numbers = [int(part) for part in module.split(".") if part.isdecimal()]
        return blocks is None or bool({*numbers} & {*(blocks if isinstance(blocks, list) else [blocks])})

    def _of_module(self, patterns: str, name: str, module: str) -> Any:
        for pattern, value in (self.fields.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return self.fields[name]

    def _wrong(self, what: str) -> BloomdeskError:
        return BloomdeskError(f"the adapter {self.path} cannot be merged: {what}", MERGE)

    def applied(
        self, tensors: Mapping[str, SourceTensor], keys: Mapping[str, str]
    ) -> dict[str, SourceTensor]:
        """The source's `tensors` by key, with what the adapter makes of them; `keys` has the key of each plain name.

        Raises `BloomdeskError` if the adapter changes anything else.
        """
        if not self.tensors:
            raise self._wrong(f"{self.file.name} holds no tensors")
        changes: dict[str, dict[str, SourceTensor]] = {}
        found = dict(tensors)
        for key, tensor in self.tensors.items():
            inner = key.removeprefix(OUTER)
            ending = SUFFIX.search(inner)
            if inner != key and ending and ending.end() == len(inner):
                changes.setdefault(inner[: ending.start()], {})[ending[1]] = tensor
                continue
            # A bias that was trained as it is.
            name = inner.removeprefix(PREFIX).replace(".base_layer.", ".")
            if inner == key or not name.endswith(".bias") or name not in keys:
                raise self._wrong(f"bloomdesk does not know its tensor {key[:120]}")
            if (base := tensors.get(keys[name])) is not None:
                self._check_shape(tensor, base.shape)
                found[keys[name]] = replace(tensor, key=base.key).read_as(base.dtype)
        if len({module.removeprefix(PREFIX) for module in changes}) < len(changes):
            raise self._wrong(f"it changes a module twice, with and without {PREFIX!r}")
        for module, parts in changes.items():
            if not self._is_meant(module):
                raise self._wrong(f"it has tensors of {module[:120]}, and {CONFIG} does not name that")
            self._apply(module, parts, found, keys)
        return found

    def _apply(
        self,
        module: str,
        parts: Mapping[str, SourceTensor],
        found: dict[str, SourceTensor],
        keys: Mapping[str, str],
    ) -> None:
        name = module.removeprefix(PREFIX)
        is_embedding = f"{name}.weight" == MATRIX
        a, b = (
            ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
        )
        is_known = f"{name}.weight" in keys and parts.keys() - {"lora_B.bias"} == {a, b}
        if not is_known or f"{name}.weight" in LM_HEADS:
            raise self._wrong(f"bloomdesk does not know what it does to {module[:120]}")
        base, left, right = found.get(keys[f"{name}.weight"]), parts[b], parts[a]
        rank = right.shape[0] if len(right.shape) == 2 else 0
        scaling = self.scaling(module, rank)
        if base is not None:
            rows, columns = reversed(base.shape) if is_embedding else base.shape
            self._check_shape(left, (rows, rank))
            self._check_shape(right, (rank, columns))
            found[base.key] = replace(
                base, addition=Addition(left, right, scaling, is_transposed=is_embedding)
            )
        bias = parts.get("lora_B.bias")
        if bias is not None:
            if f"{name}.bias" not in keys:
                raise self._wrong(f"{module[:120]} has no bias")
            if (base := found.get(keys[f"{name}.bias"])) is not None:
                self._check_shape(bias, base.shape)
                found[base.key] = replace(base, addition=Addition(bias, None, scaling))

    def _check_shape(self, tensor: SourceTensor, shape: Iterable[int]) -> None:
        if tensor.shape != tuple(shape) or tensor.dtype not in ("F32", "F16", "BF16"):
            raise self._wrong(
                f"{tensor.key[:120]} is {tensor.dtype} {list(tensor.shape)}, expected {list(shape)}"
            )


def read_adapter(path: Path) -> Adapter:
    """The adapter in the directory `path`.

    Raises `BloomdeskError` if there is none, its files are not sound, or it is of a kind that bloomdesk doesn't merge.
    """
    data = read_if_exists(path / CONFIG, LARGEST_CONFIG)
    if data is None:
        raise BloomdeskError(
            f"{path} is no adapter: it has no {CONFIG}", "give the directory of a LoRA adapter"
        )
    try:
        fields = json.loads(data)
        _check_fields(fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BloomdeskError(f"{path / CONFIG}: {reason(error)}", MERGE) from None
    file = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if file is None:
        raise BloomdeskError(f"{path} has no weights of an adapter: none of {', '.join(WEIGHTS)} is there")
    base = str(fields.get("base_model_name_or_path") or "a model that it does not name")[:120]
    return Adapter(path, file, base, fields, read_shard(file))


def _check_fields(fields: dict[str, Any]) -> None:
    if fields["peft_type"] != "LORA":
        raise ValueError(
            f"an adapter of the kind {str(fields['peft_type'])[:20]}, and only LORA can be merged"
        )
    for name, value in fields.items():
        if name not in USED | HARMLESS and value not in (None, False, [], {}):
            raise ValueError(f"{name[:60]} is set, which changes how an adapter is merged")
    if fields.get("modules_to_save"):
        raise ValueError("modules_to_save is set: whole modules were trained")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(OTHER_BASE):
        raise ValueError(
            f"init_lora_weights is {start[:20]}, which changed the model's own weights before training"
        )
    patterns = {**(fields.get("rank_pattern") or {}), **(fields.get("alpha_pattern") or {})}
    if not all(PATTERN.fullmatch(pattern) for pattern in patterns):
        raise ValueError("rank_pattern or alpha_pattern has regular expressions that bloomdesk does not read")
    numbers = [fields["r"], fields["lora_alpha"], *patterns.values()]
    if not all(type(number) in (int, float) and 0 < number < 2**31 for number in numbers):
        raise ValueError("r, lora_alpha, rank_pattern and alpha_pattern must have positive numbers")
