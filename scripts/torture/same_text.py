"""Drawn texts, made alone, in company, behind a draft and interrupted: each must be the very same.

    python -m scripts.torture.same_text [--settings 40] [--tokens 500]

Settings of sampling are drawn at random. Each text of the miniature is made alone, in a batch of 16, with n-grams and
the draft model, behind its own int4 form, and in a session that is ended at 20 random moments within a pass, and opened
again by a newly loaded model.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import runner
from runner.generation.model import Model
from runner.generation.options import GenerationOptions, Sampling
from scripts.fakehub import checkpoint
from toolkit.commands.convert import convert

PROMPTS = (
    "The SQL command to show all the users is:",
    "The Spanish translation of thank you for your help is:",
    "When I was 6 my sister was half my age. Now I am 70. How old is my sister? Let us think step by step.",
)
BATCH, INTERRUPTIONS = 16, 20


class Interrupted(Exception):
    """Stands for a kill in the middle of a pass."""


def settings(count: int, vocab_size: int) -> Iterator[Sampling]:
    """Any combination of the options."""
    chance = random.Random(3)
    for number in range(count):
        temperature = chance.choice((0.0, 0.3, 0.8, 1.0, 1.7))
        drawn = {
            "top_k": chance.choice((0, 0, 5, 40)),
            "top_p": chance.choice((1.0, 1.0, 0.5, 0.95)),
            "min_p": chance.choice((0.0, 0.0, 0.05)),
            "seed": number,
        }
        yield Sampling(
            temperature=temperature,
            **(drawn if temperature else {}),
            repetition_penalty=chance.choice((1.0, 1.0, 1.2, 0.9)),
            presence_penalty=chance.choice((0.0, 0.0, 0.5)),
            frequency_penalty=chance.choice((0.0, 0.0, 0.3)),
            logit_bias=chance.choice(({}, {chance.randrange(vocab_size): 2.0})),
            min_new_tokens=chance.choice((0, 30)),
            ignore_eos=True,
        )


def interrupted(
    directory: Path, session: Path, prompt: str, tokens: int, sampling: Sampling, seed: int
) -> list[int]:
    """The text, made by as many processes' worth of models as there are interruptions, and one more."""
    chance = random.Random(seed)
    for left in range(INTERRUPTIONS, -1, -1):
        parts = iter(range(chance.randrange(100, 140 * tokens // INTERRUPTIONS))) if left else None

        def on_part(part: int, count: int, parts: Iterator[int] | None = parts) -> None:
            if parts is not None and next(parts, None) is None:
                raise Interrupted

        try:
            model = runner.load(directory)
            return list(
                model.generate(
                    prompt, max_new_tokens=tokens, sampling=sampling, session=session, on_part=on_part
                )
            )
        except Interrupted:
            continue
    raise AssertionError("never done")


def in_company(
    model: Model, prompts: list[str], chosen: list[Sampling], tokens: int, options: GenerationOptions
) -> list[list[int]]:
    """The texts of all prompts, made in batches."""
    pairs = zip(prompts, chosen, strict=True)
    requests = [request for prompt, each in pairs for request in model.requests(prompt, tokens, each)]
    found = list(model.batch(requests, options).run())
    return [each.ids for each in sorted(found, key=lambda each: each.index)]


def main() -> None:
    """Make all texts in each way; exit status 1 if one differs."""
    parser = argparse.ArgumentParser(description="Make drawn texts in several ways, and compare them.")
    parser.add_argument("--settings", type=int, default=40, metavar="N")
    parser.add_argument("--tokens", type=int, default=500, metavar="N")
    given = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        checkpoint.miniature(work / "source")
        convert(work / "source", work / "bloom")
        checkpoint.main(["miniature-draft", str(work / "draft source")])
        convert(work / "draft source", work / "draft")
        convert(work / "bloom", work / "int4", form="int4")
        model = runner.load(work / "bloom")
        chosen = list(settings(given.settings, model.weights.model.vocab_size))
        prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(chosen))]
        alone = GenerationOptions(given.tokens, "off", batch=1)
        texts = in_company(model, prompts, chosen, given.tokens, alone)
        ways = {
            "in a batch of 16": GenerationOptions(given.tokens, "off", batch=BATCH),
            "in a batch of 16, with a draft": GenerationOptions(
                given.tokens, draft=work / "draft", batch=BATCH
            ),
            "with a draft": GenerationOptions(given.tokens, draft=work / "draft", batch=1),
            "with its int4 form as draft": GenerationOptions(given.tokens, "off", work / "int4", batch=1),
            "in a batch of 16, with its int4 form as draft": GenerationOptions(
                given.tokens, "off", work / "int4", batch=BATCH
            ),
        }
        made = {
            way: in_company(model, prompts, chosen, given.tokens, options) for way, options in ways.items()
        }
        made[f"interrupted {INTERRUPTIONS} times"] = [
            interrupted(work / "bloom", work / f"session {number}", prompt, given.tokens, sampling, number)
            for number, (prompt, sampling) in enumerate(zip(prompts, chosen, strict=True))
        ]
        for way, found in made.items():
            wrong = [
                number for number, (one, other) in enumerate(zip(texts, found, strict=True)) if one != other
            ]
            failures += len(wrong)
            print(f"{way}: {len(texts) - len(wrong)} of {len(texts)} texts the same", flush=True)
            for number in wrong:
                print(f"  differs: {chosen[number]}")
    distinct = len({tuple(text) for text in texts})
    print(f"{distinct} distinct texts, {sum(map(len, texts)):,} tokens; {failures} differ")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
