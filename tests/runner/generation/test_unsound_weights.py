"""Weights that are no numbers: one sentence with the place, in a batch for the text concerned alone, and no result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import runner
from runner import BloomdeskError
from runner.format.safetensors import read_header
from runner.generation.model import Model
from runner.generation.options import Sampling
from runner.model.forward import ModelRunner
from runner.model.kv_cache import Segment
from tests.support.commands import refused, run

NAN = b"\xc0\x7f"
INFINITY = b"\x80\x7f"


def spoil(directory: Path, file: str, tensor: str, number: bytes, row: int = 0) -> None:
    """Write a bfloat16 number to the first column of a row of a matrix."""
    path = directory / file
    entry = read_header(path).tensors[tensor]
    with path.open("r+b") as part:
        part.seek(entry.start + row * (entry.nbytes // entry.shape[0]))
        part.write(number)


@pytest.fixture
def spoilt(made_copy: Path) -> Model:
    spoil(made_copy, "block_01.safetensors", "mlp.dense_h_to_4h.weight", NAN)
    return runner.load(made_copy)


@pytest.mark.parametrize(
    ("file", "tensor", "number", "where"),
    [
        ("block_01.safetensors", "mlp.dense_4h_to_h.weight", NAN, "from block 1 or 2 of 3 on"),
        ("block_01.safetensors", "mlp.dense_4h_to_h.weight", INFINITY, "from block 1 or 2 of 3 on"),
        (
            "block_00.safetensors",
            "self_attention.query_key_value.weight",
            NAN,
            "from the embedding or block 0 on",
        ),
        ("block_02.safetensors", "mlp.dense_4h_to_h.weight", NAN, "after the last block"),
        ("embedding.safetensors", "word_embeddings.weight", NAN, "after the last block"),
    ],
)
def test_the_place_is_named(made_copy: Path, file: str, tensor: str, number: bytes, where: str) -> None:
    spoil(made_copy, file, tensor, number, row=20)
    generation = runner.load(made_copy).generate([5, 6], max_new_tokens=8)
    with pytest.raises(BloomdeskError, match=f"not finite .NaN or infinity. {where}"):
        next(generation)
    assert generation.passes == 1


def test_a_drawn_token_a_draft_and_a_score_are_refused_too(spoilt: Model) -> None:
    draft = spoilt.weights.stream.chunks[0].file.path.parent
    for options in ({"sampling": Sampling(1.0, seed=1)}, {"draft": draft}):
        with pytest.raises(BloomdeskError, match="not finite"):
            list(spoilt.generate([5, 6] * 9, max_new_tokens=8, **options))


def test_in_a_batch_only_the_text_concerned_fails(made_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = runner.load(made_copy)
    sound = list(model.generate([5, 6], max_new_tokens=4))
    forward_all = ModelRunner.forward_all

    def spoil_first(self: ModelRunner, segments: list[Segment], on_part: object = None) -> list[torch.Tensor]:
        return [
            logits * torch.nan if segment.ids[0] == 20 else logits
            for segment, logits in zip(segments, forward_all(self, segments, on_part), strict=True)
        ]

    monkeypatch.setattr(ModelRunner, "forward_all", spoil_first)
    found = {each.index: each for each in model.generate_all([[20], [5, 6]], max_new_tokens=4)}
    assert (found[0].stop_reason, found[0].ids) == ("failed", [])
    assert isinstance(found[0].failure, BloomdeskError)
    assert (found[1].failure, found[1].ids) == (None, sound)


def test_the_command_fails_and_writes_no_result(made_copy: Path, tmp_path: Path) -> None:
    spoil(made_copy, "block_01.safetensors", "mlp.dense_h_to_4h.weight", NAN)
    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a", "b")))
    done = run("generate", made_copy, "--prompts", prompts, "--out", out, "--max-new-tokens", "4")
    assert done.returncode == 1
    assert f"error: {prompts}, line 1: the model's numbers are not finite" in done.stderr
    assert f"{out} has the results of 0 of 2 prompts" in done.stderr
    assert out.read_bytes() == b""
    for command in (["generate", made_copy, "a"], ["score", made_copy, prompts]):
        if command[0] == "score":
            prompts.write_text(json.dumps({"text": "a text"}))
        assert "are not finite" in refused(*command)


def test_a_session_keeps_nothing_of_such_a_pass(spoilt: Model, tmp_path: Path) -> None:
    with pytest.raises(BloomdeskError, match="not finite"):
        list(spoilt.generate([5, 6], max_new_tokens=4, session=tmp_path / "s"))
    assert (tmp_path / "s" / "cache.bin").stat().st_size == 0
