"""How prompts are continued: one object of options for a run, one for a prompt, from the command line to the batch."""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from runner.errors import BloomdeskError

LOOKUP, OFF = "lookup", "off"
# The fields of `Sampling` that say which texts are valid; each holds a text.
JSON_SCHEMA, REGEX, GRAMMAR = CONSTRAINTS = "json_schema", "regex", "grammar"
DEFAULT_NEW_TOKENS = 64
SEED_BITS = 64
# Drawn seeds are short enough to be typed again.
DRAWN_BITS = 32
# Of a penalty or a bias: whatever is added and multiplied, float32 holds it.
LARGEST_CHANGE = 1e12
# Each is a text of its own, which takes RAM before its turn comes.
MOST_CHOICES = 2**16
_ID = re.compile(r"[0-9]{1,18}", re.ASCII)


@dataclass(frozen=True)
class GenerationOptions:
    """Options of a run. Raises `BloomdeskError` for an unknown `speculate`, or a `batch` below 1.

    speculate   "lookup" has n-grams of the text propose tokens, "off" does not; neither changes the output
    draft       directory of a small prepared BLOOM, or of another form of the model, that proposes tokens as well
    batch       the largest number of prompts that share a pass; None leaves it to the memory plan
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    speculate: str = LOOKUP
    draft: Path | str | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        if self.speculate not in (LOOKUP, OFF):
            raise BloomdeskError(f"unknown --speculate {self.speculate!r}", f"choose {LOOKUP} or {OFF}")
        if self.batch is not None and self.batch < 1:
            raise BloomdeskError(f"a batch must be of at least 1 prompt, found {self.batch}")


@dataclass(frozen=True)
class Sampling:
    """How a continuation is chosen; the default is the likeliest token. Raises `BloomdeskError` for impossible values.

    temperature         above 0 draws tokens from the softmax of logits / temperature; 0 takes the likeliest one
    top_k               draws among the k likeliest tokens; 0 for all
    top_p               draws among the likeliest tokens that together have this probability
    min_p               draws among tokens of at least this fraction of the likeliest one's probability
    repetition_penalty  divides the logits of tokens that the prompt or the text has, or multiplies negative ones
    presence_penalty    is taken from the logits of tokens that the text has
    frequency_penalty   is taken from them as often as the text has them
    logit_bias          is added to the logits of these token ids
    seed                makes a drawn text repeatable; None draws one
    n                   number of continuations of the prompt
    stop                texts that end the continuation; they are not part of it
    min_new_tokens      tokens before the text may end by itself
    ignore_eos          the end-of-text token ends nothing
    logprobs            number of likeliest tokens whose log-probabilities are reported beside each new token's own;
                        None for no log-probabilities
    json_schema         JSON schema that the output fits
    regex               regular expression that the whole output matches
    grammar             Lark grammar, as llguidance reads it, that the output follows; at most one of the three
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        # A text alone is one stop text, and not one for each of its characters.
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stops)
        self._check_types()
        self._check_numbers()
        self._check_constraints()
        if not self.draws:
            idle = [name for name in ("top_k", "top_p", "min_p", "seed", "n") if self._is_set(name)]
            if idle:
                raise BloomdeskError(
                    f"{idle[0]} has no effect without a temperature above 0",
                    "give a temperature, such as 0.8",
                )

    def _check_types(self) -> None:
        for each in fields(self):
            name, value = each.name, getattr(self, each.name)
            kind, _, may_be_none = each.type.partition(" | ")
            if name in ("stop", "logit_bias") or (may_be_none and value is None):
                continue
            expected, words = _KINDS[kind]
            if not isinstance(value, expected) or (isinstance(value, bool) and kind != "bool"):
                raise BloomdeskError(f'"{name}" is {words}, found {_shown(value)}')
        for token, bias in self.logit_bias.items():
            if not (is_whole(token) and isinstance(bias, Real) and not isinstance(bias, bool)):
                raise BloomdeskError('"logit_bias" maps token ids to numbers, as in {"42": -5}')
        for text in (*self.stop, *filter(None, (getattr(self, name) for name in CONSTRAINTS))):
            if not isinstance(text, str):
                raise BloomdeskError('"stop" is a text, or a list of texts')
            if not can_be_written(text):
                name = "a stop text" if text in self.stop else "a constraint"
                raise BloomdeskError(f"{name} is not valid UTF-8 text: {_shown(text)}")

    def _check_numbers(self) -> None:
        changes = (self.presence_penalty, self.frequency_penalty, *self.logit_bias.values())
        largest = f"{LARGEST_CHANGE:.0e}".replace("+", "")
        for is_possible, what in (
            (
                all(abs(change) <= LARGEST_CHANGE for change in changes),
                f"presence and frequency penalty and logit biases must be numbers from -{largest} to {largest}",
            ),
            (
                1 / LARGEST_CHANGE <= self.repetition_penalty <= LARGEST_CHANGE,
                "the repetition penalty must be above 0, from 1e-12 to 1e12, "
                f"found {_shown(self.repetition_penalty)}",
            ),
            (
                0 <= self.temperature <= sys.float_info.max,
                f"the temperature must be a finite number of at least 0, found {_shown(self.temperature)}",
            ),
            (self.top_k >= 0, f"top_k must be at least 0, found {self.top_k}"),
            (0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, found {_shown(self.top_p)}"),
            (0 <= self.min_p <= 1, f"min_p must be from 0 to 1, found {_shown(self.min_p)}"),
            (
                self.seed is None or 0 <= self.seed < 2**SEED_BITS,
                f"a seed is a whole number from 0 to 2^{SEED_BITS} - 1, found {self.seed}",
            ),
            (
                1 <= self.n <= MOST_CHOICES,
                f"n must be at least 1 and at most {MOST_CHOICES:,}, found {_shown(self.n)}",
            ),
            (all(self.stop), "a stop text must not be empty"),
            (
                self.logprobs is None or self.logprobs >= 0,
                f"logprobs must be at least 0, found {self.logprobs}",
            ),
            (self.min_new_tokens >= 0, f"min_new_tokens must be at least 0, found {self.min_new_tokens}"),
        ):
            if not is_possible:
                raise BloomdeskError(what)

    def _check_constraints(self) -> None:
        given = [name for name in CONSTRAINTS if self._is_set(name)]
        contradicting = [*given, *["ignore_eos"] * self.ignore_eos]
        if given and len(contradicting) > 1:
            raise BloomdeskError(
                f"{contradicting[0]} and {contradicting[1]} exclude each other", "leave one out"
            )

    def _is_set(self, name: str) -> bool:
        return getattr(self, name) != type(self).__dataclass_fields__[name].default

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn; otherwise the likeliest one is taken."""
        return self.temperature > 0

    @property
    def constraint(self) -> tuple[str, str] | None:
        """The field that says which texts are valid, and its text."""
        return next(((name, getattr(self, name)) for name in CONSTRAINTS if self._is_set(name)), None)

    @property
    def is_plain(self) -> bool:
        """Whether the token is the one with the largest logit."""
        changes = (self.presence_penalty, self.frequency_penalty, self.logit_bias, self.min_new_tokens)
        return not self.draws and self.repetition_penalty == 1 and not any(changes)

    def seeded(self, seed: int | None = None) -> Sampling:
        """These options with `seed`, or else a new one, if they draw tokens and have none of their own."""
        if not self.draws or self.seed is not None:
            return self
        return replace(self, seed=drawn_seed() if seed is None else seed)


def drawn_seed() -> int:
    """A seed that nobody gave."""
    return secrets.randbits(DRAWN_BITS)


_KINDS = {
    "float": (Real, "a number"),
    "int": (Integral, "a whole number"),
    "bool": (bool, "true or false"),
    "str": (str, "a text"),
}


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, and not true or false."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _shown(value: object) -> str:
    """A value as a sentence has room for it."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def can_be_written(text: str) -> bool:
    """False with bytes that are no UTF-8, or half of a pair of surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


GREEDY = Sampling()

SAMPLING_FIELDS = {each.name: each.type for each in fields(Sampling)}


def with_fields(sampling: Sampling, given: Mapping[str, Any]) -> Sampling:
    """`sampling` with fields from JSON in place of its own; `BloomdeskError` if one has the wrong type."""
    values = dict(given)
    if any(name in given for name in CONSTRAINTS):
        values = dict.fromkeys(CONSTRAINTS) | values
    for name, value in given.items():
        if name == "logit_bias":
            values[name] = _biases(value)
        elif name == "stop" and not isinstance(value, str | list | tuple):
            raise BloomdeskError('"stop" is a text, or a list of texts')
        elif name in CONSTRAINTS:
            values[name] = _constraint(name, value)
    return replace(sampling, **values)


def _constraint(name: str, given: Any) -> str | None:
    if name == JSON_SCHEMA and isinstance(given, dict | bool):
        return json.dumps(given, ensure_ascii=False)
    if not isinstance(given, str | None):
        raise BloomdeskError(f'"{name}" is a text{", or an object" * (name == JSON_SCHEMA)}')
    return given


def _biases(given: Any) -> dict[int, float]:
    pairs = given.items() if isinstance(given, Mapping) else [("", None)]
    if not all(_ID.fullmatch(token) and isinstance(bias, int | float) for token, bias in pairs):
        raise BloomdeskError('"logit_bias" maps token ids to numbers, as in {"42": -5}')
    return _each_once((int(token), bias) for token, bias in pairs)


def read_biases(given: Iterable[str]) -> dict[int, float]:
    """Biases by token id from texts like "42=-5"; `BloomdeskError` for any other, or two of one token."""
    return _each_once(map(_bias, given))


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        if not _ID.fullmatch(token):
            raise ValueError(token)
        return int(token), float(bias)
    except ValueError:
        raise BloomdeskError(
            f"a logit bias is a token id and a number, found {text!r}", "give it as --logit-bias 42=-5"
        ) from None


def _each_once(pairs: Iterable[tuple[int, float]]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for token, bias in pairs:
        if token in biases:
            raise BloomdeskError(f"two logit biases of token id {token}", "leave one out")
        biases[token] = bias
    return biases
