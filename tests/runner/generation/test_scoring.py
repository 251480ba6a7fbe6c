"""Log-probabilities of tokens are the reference's, and the same however a text was made."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import runner
from runner.generation.options import Sampling
from runner.generation.scoring import log_probabilities, score
from tests.support.commands import refused, run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_log_probabilities_are_torchs(dtype: torch.dtype) -> None:
    row = (torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 5).to(dtype)
    torch.testing.assert_close(
        log_probabilities(row), torch.log_softmax(row.float(), 0), rtol=1e-6, atol=1e-6
    )
    assert float(log_probabilities(row).double().exp().sum()) == pytest.approx(1, abs=1e-6)


def test_the_likeliest_tokens_come_first_and_equal_ones_by_their_ids() -> None:
    found = score(torch.tensor([0.0, 2.0, 1.0, 2.0]), 2, top=3)
    assert [token for token, _ in found.top] == [1, 3, 2] and found.top[2][1] == found.logprob
    assert not found.is_greedy and score(torch.tensor([0.0, 2.0, 1.0]), 1, top=1).is_greedy
    assert score(torch.tensor([0.0, math.log(3)]), 0).logprob == pytest.approx(math.log(0.25))


@pytest.mark.parametrize("sampling", [Sampling(logprobs=2), Sampling(1.0, seed=4, logprobs=0, top_k=9)])
def test_scores_of_a_text_are_those_of_its_own_logits(prepared, sampling: Sampling) -> None:
    """Before temperature and penalties."""
    model = runner.load(prepared()[1])
    prompt = [5, 700, 31, 5, 700, 31]
    for options in ({"speculate": "off"}, {"speculate": "lookup"}):
        found = next(model.generate_all([prompt], max_new_tokens=12, sampling=sampling, **options))
        rows = model.forward([*prompt, *found.ids[:-1]], model.cache(40), all_rows=True)[len(prompt) - 1 :]
        assert found.scores == [
            score(row, token, sampling.logprobs) for row, token in zip(rows, found.ids, strict=True)
        ]


def test_the_command_reports_log_probabilities(miniature: tuple[Path, Path]) -> None:
    done = run("generate", miniature[1], "SELECT", "--logprobs", "2", "--json", "--max-new-tokens", "3")
    found = json.loads(done.stdout)
    assert [each["id"] for each in found["logprobs"]] == found["token_ids"]
    assert all(
        each["logprob"] == each["top"][0]["logprob"] <= 0 and len(each["top"]) == 2
        for each in found["logprobs"]
    )
    assert "nowhere to go" in refused("generate", miniature[1], "SELECT", "--logprobs", "2")
