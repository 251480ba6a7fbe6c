"""Requests of random tokens, and batches of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from runner.generation.batch import Batch
from runner.generation.model import Model
from runner.generation.options import GenerationOptions
from runner.generation.sequence import Request

DTYPES = ["bfloat16", "float16", "float32"]


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(4, 1200, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def plain(model: Model, requests: list[Request]) -> list[list[int]]:
    """The tokens of each request's own run, one row at a time after the prompt."""
    return [plain_run(model, request.prompt_ids, request.max_new_tokens) for request in requests]


def plain_run(model: Model, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
    cache, ids, rows = model.cache(len(prompt_ids) + max_new_tokens), [], list(prompt_ids)
    while len(ids) < max_new_tokens and ids[-1:] != [model.weights.model.eos_token_id]:
        ids.append(int(model.forward(rows, cache)[-1].float().argmax()))
        rows = ids[-1:]
    return ids


def batched(
    model: Model,
    requests: list[Request],
    batch: int | None = None,
    speculate: str = "lookup",
    draft: Path | None = None,
    on_part: Callable[[int, int], None] | None = None,
) -> Batch:
    return model.batch(requests, GenerationOptions(speculate=speculate, draft=draft, batch=batch), on_part)
