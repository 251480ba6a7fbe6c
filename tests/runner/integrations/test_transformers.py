"""transformers' generate() on a prepared directory gives what it gives on the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    StoppingCriteria,
    TextStreamer,
    pipeline,
)
from transformers.generation import SuppressTokensLogitsProcessor

import runner
from runner.errors import BloomdeskError
from runner.integrations.transformers import BloomdeskForCausalLM, RunnerCache
from tests.support.oracle import IDS, plain_source, use_own_arithmetic
from toolkit.commands.convert import convert

PROMPTS = [
    "SELECT name FROM",
    "The Chinese translation of I have four birds is:",
    "The SQL command to show all the users is:",
]


@pytest.fixture(scope="module")
def models(miniature: tuple[Path, Path]) -> tuple[BloomdeskForCausalLM, Any, Any]:
    """Ours, the reference, and the tokenizer."""
    source, directory = miniature
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    ours = BloomdeskForCausalLM.from_prepared(directory, ram="2GB")
    return ours, AutoModelForCausalLM.from_pretrained(source, dtype="auto"), tokenizer


def generated(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(**inputs, max_new_tokens=12, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "repetition_penalty": 1.2},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "min_p": 0.01},
        {"use_cache": False},
        {"logits_processor": LogitsProcessorList([SuppressTokensLogitsProcessor([559])])},
    ],
)
def test_batches_with_padding_are_continued_as_the_reference_does(models, options: dict[str, Any]) -> None:
    ours, reference, tokenizer = models
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert torch.equal(generated(ours, inputs, **options), generated(reference, inputs, **options))


@pytest.mark.parametrize("helper", ["lookup", "assistant", "own assistant"])
def test_assisted_generation_changes_nothing(models, draft: tuple[Path, Path], helper: str) -> None:
    ours, reference, tokenizer = models
    inputs = tokenizer("SELECT name FROM a; SELECT name FROM", return_tensors="pt")
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if helper == "assistant":
        options = {"assistant_model": AutoModelForCausalLM.from_pretrained(draft[0], dtype="auto")}
    if helper == "own assistant":
        options = {"assistant_model": BloomdeskForCausalLM.from_prepared(draft[1])}
    assert torch.equal(generated(ours, inputs, **options), generated(reference, inputs))


def test_its_generation_config_is_that_of_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_own_arithmetic(monkeypatch)
    source = tmp_path / "source"
    plain_source(source)
    ids = torch.tensor([IDS])
    plain = AutoModelForCausalLM.from_pretrained(source, dtype="auto").generate(ids, max_new_tokens=8)
    ends = [2, int(plain[0, -4])]
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "pad_token_id": 3}))
    convert(source, tmp_path / "out")
    ours = BloomdeskForCausalLM.from_prepared(tmp_path / "out")
    reference = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    found = ours.generate(ids, max_new_tokens=8)
    assert found.shape < plain.shape and torch.equal(found, reference.generate(ids, max_new_tokens=8))
    assert ours.generation_config.to_dict() == reference.generation_config.to_dict()
    assert "type `bloom`" not in caplog.text


def test_logits_are_those_of_the_runner(models, miniature: tuple[Path, Path]) -> None:
    """Padding on either side changes nothing, and only the rows that are asked for are computed."""
    ours, _, tokenizer = models
    model = runner.load(miniature[1])
    for side in ("left", "right"):
        inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side=side)
        found = ours(**inputs).logits
        for row, ids in enumerate(model.tokenizer.encode(prompt) for prompt in PROMPTS):
            expected = model.forward(ids, model.cache(len(ids)), all_rows=True)
            assert torch.equal(found[row][inputs["attention_mask"][row].bool()], expected)
        assert torch.equal(ours(**inputs, logits_to_keep=2).logits, found[:, -2:])
        kept = torch.tensor([1, 3])
        assert torch.equal(ours(**inputs, logits_to_keep=kept).logits, found[:, kept])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected = torch.nn.functional.cross_entropy(
        found[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(ours(**inputs, labels=labels).loss, expected)


def test_a_cache_grows_and_is_continued(models) -> None:
    ours, _, tokenizer = models
    ids = tokenizer(PROMPTS[1] * 40, return_tensors="pt")["input_ids"]
    whole = ours(ids).logits
    cache, found = None, []
    for start in range(0, ids.shape[1], 100):
        step = ours(ids[:, start : start + 100], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        found.append(step.logits)
    assert torch.equal(torch.cat(found, 1), whole)
    cache.crop(-50)
    again = ours(ids[:, -50:], past_key_values=cache).logits
    assert torch.equal(again, whole[:, -50:])


def test_streamers_criteria_and_pipelines_work(models, capsys: pytest.CaptureFixture[str]) -> None:
    ours, _, tokenizer = models

    class AtOnce(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.ones(len(input_ids), dtype=torch.bool)

    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    assert generated(ours, inputs, stopping_criteria=[AtOnce()]).shape[1] == inputs["input_ids"].shape[1] + 1
    text = tokenizer.decode(generated(ours, inputs, streamer=TextStreamer(tokenizer))[0])
    assert text.strip() in capsys.readouterr().out
    found = pipeline("text-generation", model=ours, tokenizer=tokenizer)(PROMPTS[0], max_new_tokens=8)
    assert found[0]["generated_text"].startswith(PROMPTS[0] + " employees")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 2, 48)}, "embeddings"),
        ({"past_key_values": object()}, "past_key_values"),
        ({"attention_mask": torch.ones(1, 9)}, "attention mask"),
        ({"output_hidden_states": True}, "output_hidden_states cannot be had"),
        ({"output_attentions": True}, "output_attentions cannot be had"),
    ],
)
def test_what_the_runner_cannot_do_is_named(models, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BloomdeskError, match=message):
        models[0](torch.tensor([[5, 6]]), **options)
    cache = RunnerCache()
    models[0](torch.tensor([[5, 6]]), past_key_values=cache)
    with pytest.raises(BloomdeskError, match="of 1 rows"):
        models[0](torch.tensor([[5], [6]]), past_key_values=cache)
    with pytest.raises(ValueError, match="below 0"):
        cache.crop(1)


@pytest.mark.parametrize("token", [-1, 10**12])
def test_a_token_outside_the_vocabulary_is_named(models, token: int) -> None:
    with pytest.raises(BloomdeskError, match=f"token id {token} is outside the vocabulary"):
        models[0](torch.tensor([[5, token]]))


def test_a_mask_that_changes_what_is_cached_is_refused(models) -> None:
    cache = models[0](torch.tensor([[5, 6]]), use_cache=True).past_key_values
    with pytest.raises(BloomdeskError, match="differs from that of the positions in the cache"):
        models[0](torch.tensor([[7]]), past_key_values=cache, attention_mask=torch.tensor([[0, 1, 1]]))


def test_a_copied_cache_goes_its_own_way(models) -> None:
    """As transformers' recipe for a prompt that many texts begin with has it."""
    model, ids = models[0], torch.tensor([[5, 6, 7, 8]])
    kept = model(ids[:, :2], use_cache=True).past_key_values
    wanted = model(ids).logits[:, 2:]
    for _ in range(2):
        assert torch.equal(model(ids[:, 2:], past_key_values=deepcopy(kept)).logits, wanted)


def test_loading_and_saving_say_where_the_weights_are(models, tmp_path: Path) -> None:
    with pytest.raises(BloomdeskError, match="opened by from_prepared"):
        BloomdeskForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(BloomdeskError, match="in the prepared directory"):
        models[0].save_pretrained(tmp_path)


@pytest.mark.slow
def test_the_runner_does_without_transformers() -> None:
    code = "import runner, runner.generation.model, sys; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
