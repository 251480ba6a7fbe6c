"""Sampled tokens: chosen as transformers' processors choose, and by nothing but logits, seed and place."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as reference

import runner
from runner.errors import BloomdeskError
from runner.generation.noise import exp, gumbel, log, philox
from runner.generation.options import GREEDY, GenerationOptions, Sampling
from runner.generation.sampling import Sampler, warped
from tests.support.commands import refused, run
from tests.support.prompts import tokens

SETTINGS = [
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.7, top_k=5, seed=2),
    Sampling(temperature=1.3, top_p=0.8, seed=3),
    Sampling(temperature=2.0, min_p=0.2, seed=4),
    Sampling(temperature=0.9, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.2, seed=5),
    Sampling(
        temperature=1.0, presence_penalty=0.5, frequency_penalty=0.3, logit_bias={7: 3.0, 2: -9}, seed=6
    ),
    Sampling(repetition_penalty=1.3, min_new_tokens=9),
]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_its_authors_numbers(
    counter: tuple[int, ...], key: tuple[int, int], expected: str
) -> None:
    words = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def test_exp_and_log_are_right_to_the_last_bits() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(20_000, dtype=torch.float64, generator=generator).clamp(min=1e-300)
    torch.testing.assert_close(log(x), x.log(), rtol=1e-15, atol=1e-16)
    y = torch.randn(20_000, dtype=torch.float64, generator=generator) * 200
    torch.testing.assert_close(exp(y.clamp(max=700)), y.clamp(max=700).exp(), rtol=1e-15, atol=1e-300)
    assert exp(torch.tensor([-math.inf, -1000.0], dtype=torch.float64)).tolist() == [0, 0]


def test_noise_depends_on_its_place_alone() -> None:
    ids = torch.arange(1000)
    whole = gumbel(3, 1, 0, 7, ids)
    some = torch.tensor([999, 4, 5, 17])
    assert torch.equal(gumbel(3, 1, 0, 7, some), whole[some])
    others = [
        gumbel(4, 1, 0, 7, ids),
        gumbel(3, 2, 0, 7, ids),
        gumbel(3, 1, 1, 7, ids),
        gumbel(3, 1, 0, 8, ids),
    ]
    others.append(gumbel(3 + 2**40, 1, 0, 7, ids))
    assert all((whole == other).sum() == 0 for other in others)
    assert abs(float(whole.mean()) - 0.5772) < 0.15


def processors(options: Sampling, prompt: list[int]) -> LogitsProcessorList:
    """transformers' own for these options, in its order."""
    found = LogitsProcessorList()
    if options.logit_bias:
        bias = {(token,): value for token, value in options.logit_bias.items()}
        found.append(reference.SequenceBiasLogitsProcessor(bias))
    if options.repetition_penalty != 1:
        found.append(reference.RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.min_new_tokens:
        found.append(
            reference.MinNewTokensLengthLogitsProcessor(
                len(prompt), options.min_new_tokens, torch.tensor([2])
            )
        )
    if options.draws:
        found.append(reference.TemperatureLogitsWarper(options.temperature))
        found.append(reference.TopKLogitsWarper(options.top_k or 10**6))
        found.append(reference.TopPLogitsWarper(options.top_p))
        found.append(reference.MinPLogitsWarper(options.min_p))
    return found


@pytest.mark.parametrize("number", range(40))
def test_processors_are_those_of_transformers(number: int) -> None:
    chance = random.Random(number)
    options = Sampling(
        temperature=chance.choice([0.3, 1.0, 1.7]),
        top_k=chance.choice([0, 1, 7, 60]),
        top_p=chance.choice([1.0, 0.5, 0.9]),
        min_p=chance.choice([0.0, 0.02, 0.3]),
        repetition_penalty=chance.choice([1.0, 1.4, 0.8]),
        logit_bias=chance.choice([{}, {3: 2.5, 11: -4.0}]),
        min_new_tokens=chance.choice([0, 3]),
        seed=1,
    )
    prompt, ids = tokens(9, number), tokens(chance.randint(0, 5), number + 1)
    prompt, ids = [token % 200 for token in prompt], [token % 200 for token in ids]
    row = torch.randn(200, generator=torch.Generator().manual_seed(number)) * 3
    expected = processors(options, prompt)(torch.tensor([[*prompt, *ids]]), row[None].clone())[0]
    sampler = Sampler(options, prompt, {2})
    scores, kept = warped(sampler.processed(row, ids) / options.temperature, options)
    assert kept.tolist() == (expected > -math.inf).nonzero().flatten().tolist()
    torch.testing.assert_close(scores, expected[kept], rtol=0, atol=0)


def test_penalties_count_the_new_tokens() -> None:
    options = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    processed = Sampler(options, [1, 1, 2], {2}).processed(torch.zeros(6), [3, 4, 3, 3])
    assert processed.tolist() == [0, 0, 0, -1.25, -0.75, 0]


@pytest.mark.parametrize(
    "options", [Sampling(temperature=0.8), Sampling(temperature=1.2, top_k=6, top_p=0.9)]
)
def test_tokens_are_distributed_as_the_softmax(options: Sampling) -> None:
    """Chi-square with 99.9% of its distribution below the limit, over 4,000 draws of a fixed seed."""
    row = torch.tensor([1.0, 0.5, 0.0, -0.3, 2.0, 1.4, -1.0, 0.9, -5.0, 0.2])
    scores, kept = warped(row / options.temperature, options)
    expected = torch.softmax(scores.double(), 0) * 4000
    sampler = Sampler(options.seeded(12), [], ())
    counts = Counter(sampler.choose(row, [0] * position) for position in range(4000))
    observed = torch.tensor([counts[int(token)] for token in kept])
    assert observed.sum() == 4000
    degrees = len(kept) - 1
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3
    assert float(((observed - expected) ** 2 / expected).sum()) < limit


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_drawn_text_depends_on_nothing_but_model_prompt_and_seed(prepared, dtype: str) -> None:
    """Not on batch, n-grams, draft or order."""
    directory = prepared(dtype=dtype)[1]
    model = runner.load(directory)
    prompts = [tokens(4 + number, number) * 2 for number in range(len(SETTINGS))]

    def requests() -> list:
        found = []
        for number, (prompt, sampling) in enumerate(zip(prompts, SETTINGS, strict=True)):
            found += model.requests(prompt, 24, sampling, number)
        return found

    def texts(**options: object) -> list[list[int]]:
        batch = model.batch(requests(), GenerationOptions(**options))
        return [each.ids for each in sorted(batch.run(), key=lambda each: each.index)]

    alone = [
        next(model.batch([request], GenerationOptions(speculate="off")).run()).ids for request in requests()
    ]
    assert len({tuple(ids) for ids in alone}) == len(alone)
    assert texts(speculate="off", batch=3) == texts(batch=7) == texts(draft=directory, batch=2) == alone
    greedy = model.batch(model.requests(prompts[0], 24, GREEDY), GenerationOptions())
    assert next(greedy.run()).ids != alone[0]


def test_a_draft_with_the_same_weights_is_always_right(prepared) -> None:
    """It draws with the noise of the text that it drafts for."""
    directory = prepared(dtype="float32")[1]
    model = runner.load(directory)
    generation = model.generate(
        [5, 6, 7], max_new_tokens=20, sampling=Sampling(1.0, seed=3), speculate="off", draft=directory
    )
    assert len(list(generation)) == 20
    assert generation.proposed and generation.accepted == generation.proposed


def test_choices_of_a_prompt_differ_and_are_repeatable(prepared) -> None:
    model = runner.load(prepared()[1])
    sampling = Sampling(1.0, n=3, seed=8)
    for _ in range(2):
        found = list(model.generate_all([[5, 6, 7], [9, 9]], max_new_tokens=9, sampling=sampling))
        texts = {(each.request.number, each.request.choice): tuple(each.ids) for each in found}
        assert len(texts) == len(set(texts.values())) == 6
    with pytest.raises(BloomdeskError, match="one continuation"):
        model.generate([5], sampling=sampling)
    first = list(model.generate([5, 6, 7], max_new_tokens=9, sampling=Sampling(1.0, seed=8)))
    assert tuple(first) == texts[0, 0]


def test_the_end_of_the_text_waits_or_ends_nothing(prepared) -> None:
    model = runner.load(prepared()[1])
    likely = Sampling(logit_bias={2: 1000.0})
    assert list(model.generate([5, 6], max_new_tokens=6, sampling=likely)) == [2]
    later = Sampling(logit_bias={2: 1000.0}, min_new_tokens=3)
    ids = list(model.generate([5, 6], max_new_tokens=6, sampling=later))
    assert len(ids) == 4 and ids[-1] == 2 and 2 not in ids[:-1]
    ignored = Sampling(logit_bias={2: 1000.0}, ignore_eos=True)
    assert list(model.generate([5, 6], max_new_tokens=6, sampling=ignored)) == [2] * 6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1}, "at least 0"),
        ({"temperature": math.nan}, "finite"),
        ({"temperature": 1, "top_p": 0}, "top_p"),
        ({"temperature": 1, "min_p": 1.5}, "min_p"),
        ({"temperature": 1, "top_k": -1}, "top_k"),
        ({"repetition_penalty": 0}, "repetition"),
        ({"seed": 3}, "seed has no effect"),
        ({"top_p": 0.5}, "top_p has no effect"),
        ({"n": 2}, "n has no effect"),
        ({"temperature": 1, "n": 0}, "n must"),
        ({"temperature": 1, "seed": 2**64}, "a seed is"),
        ({"stop": ("",)}, "empty"),
        ({"temperature": 10**400}, "finite"),
        ({"temperature": "1"}, '"temperature" is a number'),
        ({"temperature": 1, "seed": 1.5}, '"seed" is a whole number'),
        ({"temperature": 1, "n": True}, '"n" is a whole number'),
        ({"temperature": 1, "n": 2**31}, "at most 65,536"),
        ({"ignore_eos": 1}, '"ignore_eos" is true or false'),
        ({"repetition_penalty": 1e-300}, "repetition penalty must be above 0, from 1e-12"),
        ({"presence_penalty": -1e308}, "from -1e12 to 1e12"),
        ({"frequency_penalty": math.inf}, "from -1e12 to 1e12"),
        ({"logit_bias": {5: 1e300}}, "from -1e12 to 1e12"),
        ({"logit_bias": {5: math.nan}}, "from -1e12 to 1e12"),
        ({"logit_bias": {"5": 1}}, "maps token ids to numbers"),
        ({"logit_bias": {5: True}}, "maps token ids to numbers"),
        ({"stop": ("\udcff",)}, "stop text is not valid UTF-8"),
        ({"stop": (1,)}, '"stop" is a text'),
        ({"regex": "\ud800"}, "constraint is not valid UTF-8"),
    ],
)
def test_impossible_options_are_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(BloomdeskError, match=message):
        Sampling(**wrong)


def test_a_text_as_stop_is_one_stop_text() -> None:
    assert Sampling(stop="abc").stop == ("abc",) == Sampling(stop=["abc"]).stop


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-38, 1e-30])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"min_p": 0.5}, {"top_k": 2}])
def test_the_coldest_text_is_the_likeliest(temperature: float, options: dict[str, float]) -> None:
    for row in (torch.randn(50), torch.randn(50) - 9, torch.randn(50) * 1e30):
        sampler = Sampler(Sampling(temperature=temperature, seed=1, min_new_tokens=1, **options), [1], [2])
        row[2] = row.max() - 1
        expected = Sampler(Sampling(min_new_tokens=1), [1], [2]).choose(row, [])
        assert sampler.choose(row, []) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": -1e12, "frequency_penalty": -1e12},
        {"repetition_penalty": 1e-12, "logit_bias": {5: 1e12, 6: -1e12}},
        {"repetition_penalty": 1e12, "logit_bias": {5: -1e12, 6: 1e12}},
    ],
)
def test_the_largest_changes_leave_numbers(options: dict[str, object]) -> None:
    drawn = Sampling(temperature=1e-12, top_p=0.9, min_p=0.1, seed=1, **options)
    row, ids = torch.randn(50), [5, 6, 6]
    assert Sampler(drawn, ids, [2]).processed(row, ids).isfinite().all()
    assert Sampler(drawn, ids, [2]).choose(row, ids) == Sampler(Sampling(**options), ids, [2]).choose(
        row, ids
    )


def test_more_tokens_than_may_come_are_refused(prepared) -> None:
    model = runner.load(prepared()[1])
    with pytest.raises(BloomdeskError, match="min_new_tokens, 9, is more than max_new_tokens, 8"):
        model.generate([5], max_new_tokens=8, sampling=Sampling(min_new_tokens=9))


def test_two_biases_of_a_token_are_refused(prepared) -> None:
    command = ["generate", prepared()[1], "x", "--logit-bias", "5=1"]
    assert "two logit biases of token id 5" in refused(*command, "--logit-bias", "05=2")
    assert "a token id and a number" in refused(*command, "--logit-bias", "1_0=2")


def test_the_command_draws_reports_its_seed_and_resumes_with_it(
    miniature: tuple[Path, Path], tmp_path: Path
) -> None:
    directory, out = miniature[1], tmp_path / "out.jsonl"
    lines = [
        {"prompt": "SELECT name FROM", "temperature": 1.1, "seed": 4},
        {"prompt": "John is", "n": 2},
        {"prompt": "the", "stop": ["e"], "temperature": 0, "n": 1},
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["generate", directory, "--prompts", prompts, "--max-new-tokens", "8", "--temperature", "0.9"]
    assert run(*command, "--out", out).returncode == 0
    whole = out.read_bytes()
    found = {(line["index"], line.get("choice")): line for line in map(json.loads, whole.splitlines())}
    assert set(found) == {(0, None), (1, 0), (1, 1), (2, None)}
    assert (
        found[0, None]["seed"] == 4
        and found[1, 0]["seed"] == found[1, 1]["seed"]
        and "seed" not in found[2, None]
    )
    texts = {key: line["token_ids"] for key, line in found.items()}
    for kept in range(1, 4):
        # In every order in which they may have been done, those with a seed of their own last.
        out.write_bytes(b"".join(sorted(whole.splitlines(keepends=True), reverse=True)[-kept:]))
        assert run(*command, "--out", out).returncode == 0
        again = {
            (line["index"], line.get("choice")): line
            for line in map(json.loads, out.read_bytes().splitlines())
        }
        seeds = {line.get("seed") for key, line in again.items() if key[0] == 1}
        assert len(seeds) == 1 and set(again) == set(found)
        if seeds == {found[1, 0]["seed"]}:
            assert {key: line["token_ids"] for key, line in again.items()} == texts
    alone = run(
        "generate",
        directory,
        "SELECT name FROM",
        "--temperature",
        "1.1",
        "--seed",
        "4",
        "--max-new-tokens",
        "8",
        "--json",
    )
    assert json.loads(alone.stdout)["token_ids"] == found[0, None]["token_ids"]
    prompts.write_text('{"prompt": "x", "temprature": 1}\n')
    assert 'did you mean "temperature"' in refused(*command)
    assert "has no effect" in refused("generate", directory, "x", "--top-k", "3")
