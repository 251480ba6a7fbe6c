"""Grammars: which tokens may follow, and which must, by a JSON schema, a regular expression or a Lark grammar.

    text of the constraint ──> Grammar, compiled once ──> a Matcher for each sequence ──> allowed tokens, forced tokens

llguidance parses, over the model's own tokenizer. What it says of a text depends on the text's tokens alone, so forced
tokens are the same whatever the pass, the batch or the draft. https://github.com/guidance-ai/llguidance
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from runner.errors import BloomdeskError
from runner.generation import grammar_check
from runner.generation.options import GRAMMAR, JSON_SCHEMA, REGEX, Sampling
from runner.kernel.threads import one_thread
from runner.model.tokenizer import Tokenizer
from runner.system import memory

if TYPE_CHECKING:
    import llguidance

# How JSON is set out: as `json.dumps` does, so that as much as possible is forced. A schema's "x-guidance" may differ.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Grammars that are kept for another text, and the bytes that one takes at most.
MOST_GRAMMARS = 32
MOST_GRAMMAR_BYTES = 2**26
# Characters of a reason that are shown.
LONGEST_REASON = 300
_NAMES = {JSON_SCHEMA: "the JSON schema", REGEX: "the regular expression", GRAMMAR: "the grammar"}
# What llguidance adds to its reason: a drawing of the place in the grammar, the calls that led to a panic, or a note
# that more could be said.
_ADDED = re.compile(r"\n *\d+ \|.*|<backtrace>.*|<non-verbose/>", re.DOTALL)


class GrammarError(BloomdeskError):
    """A text cannot go on by its grammar."""


class Grammars:
    """The grammars of a model: its `tokenizer` as llguidance needs it, and the latest constraints, compiled once.

    Any thread may ask for one.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: Collection[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, sorted(eos)
        self._vocabulary: llguidance.LLTokenizer | None = None
        # With the bytes that each takes, the latest last.
        self._known: OrderedDict[tuple[str, str], tuple[Grammar, int]] = OrderedDict()
        # `_lock` is for what is known. Who compiles, which may take long, holds `_compiling`.
        self._lock, self._compiling = threading.Lock(), threading.Lock()
        # Bytes of RAM that they take.
        self.nbytes = 0

    def of(self, sampling: Sampling) -> Grammar | None:
        """The grammar of `sampling`, if it has one. Raises `BloomdeskError` if that cannot be compiled."""
        if sampling.constraint is None:
            return None
        if found := self._found(sampling.constraint):
            return found
        # What other threads take meanwhile must not count.
        with self._compiling:
            return self._found(sampling.constraint) or self._add(sampling.constraint)

    def has(self, sampling: Sampling) -> bool:
        """Whether nothing has to be compiled for `sampling`."""
        return sampling.constraint is None or self._found(sampling.constraint) is not None

    def prepare(self) -> None:
        """Take the RAM that all grammars share now, if llguidance is installed and can use the tokenizer."""
        with self._compiling, suppress(BloomdeskError):
            self._prepare(JSON_SCHEMA)

    def _found(self, constraint: tuple[str, str]) -> Grammar | None:
        with self._lock:
            if constraint not in self._known:
                return None
            self._known.move_to_end(constraint)
            return self._known[constraint][0]

    def _add(self, constraint: tuple[str, str]) -> Grammar:
        self._prepare(constraint[0])
        before = memory.memory_in_use()
        grammar = self._compiled(*constraint)
        taken = min(MOST_GRAMMAR_BYTES, max(0, memory.memory_in_use() - before))
        with self._lock:
            self._known[constraint] = grammar, taken
            self.nbytes += taken
            if len(self._known) > MOST_GRAMMARS:
                self.nbytes -= self._known.popitem(last=False)[1][1]
        return grammar

    def _prepare(self, kind: str) -> None:
        library = _library()
        if self._vocabulary is None:
            before = memory.memory_in_use()
            if not self._eos:
                raise BloomdeskError(f"{_NAMES[kind]} cannot be used: the model has no end-of-text token")
            try:
                self._vocabulary = library.LLTokenizer(
                    self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=self._eos
                )
            except ValueError as error:
                raise BloomdeskError(
                    f"the tokenizer cannot be used with {_NAMES[kind]}: {_worded(str(error))}"
                ) from None
            self.nbytes += max(0, memory.memory_in_use() - before)

    def _compiled(self, kind: str, text: str) -> Grammar:
        library, source = _library(), _source(kind, text)
        try:
            matcher = _said(
                library.LLMatcher, self._vocabulary, source, log_level=0, limits=grammar_check.limits(library)
            )
            if matcher.is_error():
                raise GrammarError(_worded(matcher.get_error()))
            # Some fail at their first token only.
            first = Matcher(_said(matcher.deep_copy), frozenset(self._eos))
            forced = first.forced([])
            if not first.is_over(forced):
                first.allowed(forced)
        except GrammarError as error:
            raise _refusal(kind, error.message) from None
        return Grammar(self._vocabulary, matcher, len(forced))


@dataclass(frozen=True)
class Grammar:
    """A compiled constraint; the first `forced_tokens` tokens of all its texts are forced."""

    _vocabulary: llguidance.LLTokenizer
    _start: llguidance.LLMatcher
    forced_tokens: int

    def matcher(self) -> Matcher:
        """A matcher at the start of a text."""
        return Matcher(self._start.deep_copy(), frozenset(self._vocabulary.eos_tokens))

    def accepts(self, text: bytes) -> bool:
        """Whether `text` is a whole one."""
        matcher = self._start.deep_copy()
        return matcher.consume_tokens(self._vocabulary.tokenize_bytes(text)) and matcher.is_accepting()


class Matcher:
    """Follows a text through its grammar. Each question names the new tokens `ids` so far, which may also go back."""

    def __init__(self, matcher: llguidance.LLMatcher, eos: frozenset[int], ids: Sequence[int] = ()) -> None:
        """`ids` are what the matcher has followed, `eos` the tokens that end a text."""
        self._matcher, self._eos, self._ids = matcher, eos, list(ids)
        # Whether `_ids` may not be what the matcher has followed, since an interruption came between.
        self._is_moving = False

    def fork(self) -> Matcher:
        """A matcher at the same place that goes its own way."""
        found = Matcher(self._matcher.deep_copy(), self._eos, self._ids)
        found._is_moving = self._is_moving
        return found

    def forced(self, ids: Sequence[int]) -> list[int]:
        """The tokens that must follow, as the tokenizer would cut their text; often none.

        All questions raise `GrammarError` if the grammar is too complex to be followed.
        """
        self._follow(ids)
        found = _said(self._matcher.compute_ff_tokens)
        self._check()
        return found

    def allowed(self, ids: Sequence[int]) -> torch.Tensor:
        """The token ids that may follow, at least one, in their order; those that end a text if it may end here.

        If tokens are forced, it is the first of these alone.
        """
        self._follow(ids)
        mask = _said(self._matcher.compute_logit_bias)
        self._check()
        # Waiting for other threads takes longer than this.
        with one_thread():
            found = torch.frombuffer(bytearray(mask), dtype=torch.uint8).nonzero().flatten()
        if not len(found):
            raise GrammarError(f"no token can follow by the grammar after {len(ids):,} tokens")
        return found

    def is_over(self, ids: Sequence[int]) -> bool:
        """Whether nothing may follow."""
        self._follow(ids)
        if self._matcher.is_stopped():
            return True
        # The parser does not always know it before it looks.
        may_end = self._matcher.is_accepting()
        return may_end and self._eos.issuperset(self.allowed(ids)[: len(self._eos) + 1].tolist())

    def is_accepting(self, ids: Sequence[int]) -> bool:
        """Whether the text may end here."""
        self._follow(ids)
        return self._matcher.is_accepting()

    def possible(self, ids: Sequence[int], tokens: Sequence[int]) -> int:
        """The number of the first of `tokens` that may follow one after the other."""
        self._follow(ids)
        return _said(self._matcher.validate_tokens, list(tokens))

    def _follow(self, ids: Sequence[int]) -> None:
        if self._is_moving:
            self._matcher.reset()
            self._ids = []
        self._is_moving = True
        common = len(self._ids)
        if self._ids != ids[:common]:
            common = next(n for n, token in enumerate(self._ids) if n == len(ids) or token != ids[n])
            _said(self._matcher.rollback, len(self._ids) - common)
            del self._ids[common:]
        if more := list(ids[common:]):
            _said(self._matcher.consume_tokens, more)
            self._ids += more
        self._is_moving = False
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _worded(self._matcher.get_error())
            raise GrammarError(
                f"the grammar cannot be followed beyond {len(self._ids):,} tokens: {reason}",
                "make it simpler",
            )


def check(sampling: Sampling) -> None:
    """Raise `BloomdeskError` if the constraint of `sampling` is unsound, or llguidance is missing."""
    if sampling.constraint:
        kind, text = sampling.constraint
        library = _library()
        if reason := library.LLMatcher.validate_grammar(
            _source(kind, text), limits=grammar_check.limits(library)
        ):
            raise _refusal(kind, reason)


def check_in_time(sampling: Sampling, seconds: float) -> None:
    """As `check`, but also if that takes longer than `seconds`."""
    if sampling.constraint:
        kind, text = sampling.constraint
        if reason := grammar_check.reason_in_time(_source(kind, text), seconds):
            raise _refusal(kind, reason)


def _said(ask: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What llguidance says when it is asked. Raises `GrammarError` for whatever it raises."""
    try:
        return ask(*args, **options)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        # A panic is no Exception.
        raise GrammarError(_worded(str(error))) from None


def _library() -> Any:
    try:
        import llguidance  # an extra
    except ImportError:
        raise BloomdeskError(
            "a JSON schema, a regular expression or a grammar needs llguidance, which is not installed",
            "pip install 'bloomdesk[grammar]'",
        ) from None
    return llguidance


def _source(kind: str, text: str) -> str:
    matcher = _library().LLMatcher
    if kind == REGEX:
        return matcher.grammar_from_regex(text)
    if kind == GRAMMAR:
        return matcher.grammar_from_lark(text)
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refusal(kind, f"it is not valid JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise _refusal(kind, "it must be an object")
    try:
        # A style goes with objects alone; true is the empty one.
        style = None if schema is False else JSON_STYLE
        return _said(matcher.grammar_from_json_schema, "{}" if schema is True else text, defaults=style)
    except GrammarError as error:
        raise _refusal(kind, error.message) from None


def _refusal(kind: str, reason: str) -> BloomdeskError:
    return BloomdeskError(f"{_NAMES[kind]} cannot be used: {_worded(reason)}")


def _worded(reason: str) -> str:
    """llguidance's reason in one line."""
    return " ".join(_ADDED.sub("", reason).split())[:LONGEST_REASON]
