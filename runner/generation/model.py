"""The public model: a prepared BLOOM, its tokenizer, and the RAM that it may use."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.slice_set import SliceSet, find_all_slices
from runner.generation import sequence
from runner.generation.batch import Batch
from runner.generation.capacity import Planner
from runner.generation.decode import Generation
from runner.generation.grammar import Grammars
from runner.generation.live_batch import LiveBatch
from runner.generation.memory_plan import MemoryPlan, MemoryRequest, default_total, memory_plan
from runner.generation.options import DEFAULT_NEW_TOKENS, GREEDY, LOOKUP, GenerationOptions, Sampling
from runner.generation.scorer import Scorer, Text, plan_scoring
from runner.generation.sequence import Request
from runner.generation.session import Session, seed_of
from runner.generation.shared_prefixes import SharedPrefixes
from runner.generation.speculation.draft_model import DraftModel
from runner.generation.speculation.proposer import Proposer
from runner.generation.stops import ScannedText
from runner.model.forward import ModelRunner, OnPart
from runner.model.kv_cache import KVCache
from runner.model.tokenizer import TextStream, Tokenizer
from runner.system import memory
from runner.weights.checkpoint import Weights

# No text is as long; what is larger could not even be counted in bytes.
MOST_NEW_TOKENS = 2**31


@dataclass(frozen=True, repr=False)
class Model(ModelRunner):
    """What `runner.load` returns. `ram` limits the bytes of the whole process."""

    tokenizer: Tokenizer
    grammars: Grammars
    ram: int
    # Bytes of the process before it reads any matrix.
    process_nbytes: int

    @classmethod
    def open(cls, directory: Path, ram: int | None = None, also: Sequence[Path] = ()) -> Model:
        """The model in `directory`; by default `ram` is most of what the machine, or its control group, can spare.

        If it is spread over several directories, those of `also` are where others are now. Raises `BloomdeskError` if
        the directory is not a sound, complete prepared checkpoint.
        """
        return cls.of(find_all_slices(directory, also), ram)

    @classmethod
    def of(cls, slices: SliceSet, ram: int | None = None) -> Model:
        """The model of slices that were found; see `Weights.of`."""
        memory.give_freed_memory_back()
        weights, directory = Weights.of(slices), slices.directories[slices.asked]
        tokenizer = Tokenizer(directory / "tokenizer.json")
        grammars = Grammars(tokenizer, weights.model.vocab_size, weights.model.eos_token_ids)
        return cls(weights, tokenizer, grammars, ram or default_total(), memory.memory_in_use())

    def __repr__(self) -> str:
        shape = self.weights.model
        return f"<BLOOM of {shape.n_layer} blocks of width {shape.hidden_size:,} in {self.ram / 1e9:.3g} GB of RAM>"

    def memory_request(self, capacities: Iterable[int], rows: int) -> MemoryRequest:
        """What passes of up to `rows` rows need, with a cache for each of `capacities` positions."""
        chunks = tuple(chunk.nbytes for chunk in self.weights.stream.chunks)
        process, stream = self.process_nbytes + self.grammars.nbytes, self.weights.stream
        heads = len(self.weights.heads) if self.weights.slice else None
        return MemoryRequest(
            self.weights.model,
            chunks,
            self.ram,
            process,
            tuple(capacities),
            rows,
            disks=stream.disks,
            heads=heads,
        )

    def memory_plan(self, capacity: int, rows: int) -> MemoryPlan:
        """The memory plan for one sequence. Raises `BloomdeskError` if the RAM is too little."""
        return memory_plan(self.memory_request([capacity], rows))

    def cache(self, capacity: int, rows: int | None = None) -> KVCache:
        """An empty KV cache for `capacity` positions; the weights are arranged beside it by the memory plan.

        A pass may have up to `rows` rows, by default as many as the cache has positions.
        """
        plan = self.memory_plan(capacity, capacity if rows is None else rows)
        self.arrange(plan)
        return self.new_cache(capacity)

    def generate(
        self,
        prompt_or_ids: str | Sequence[int],
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        sampling: Sampling = GREEDY,
        speculate: str = LOOKUP,
        draft: Path | str | None = None,
        session: Path | str | None = None,
        on_part: OnPart | None = None,
    ) -> Generation:
        """The continuation: an iterator of token ids that ends with `</s>`, a stop text or after `max_new_tokens`.

        The tokens are the likeliest ones, unless `sampling` says otherwise. A step of the iterator is one pass, or none
        if the pass before gave several tokens. Draft tokens change no token: those of the text's n-grams with
        `speculate="lookup"`, and those of a small model, or of another form of this one, in the directory `draft`. With
        `speculate="off"` and no draft a pass gives one token.

        With a directory `session`, each pass is kept there, and a later call goes on from it: from the end if prompt
        and sampling are the same, else from where the prompts differ.

        Raises `BloomdeskError` for an empty prompt, an id outside the vocabulary, a `max_new_tokens` below 1, several
        continuations, an unsound grammar, an unsuitable draft, another model's session, or too little RAM.
        """
        if sampling.n > 1:
            raise BloomdeskError("generate gives one continuation", "call generate_all for more of them")
        options = GenerationOptions(max_new_tokens, speculate, draft)
        if session is not None:
            sampling = sampling.seeded(seed_of(Path(session)))
        requests = self.requests(prompt_or_ids, max_new_tokens, sampling)
        kept = self.session(Path(session), requests[0], warnings.warn) if session is not None else None
        return self.batch(requests, options, on_part, Generation, kept)

    def session(self, directory: Path, request: Request, warn: Callable[[str], None]) -> Session:
        """The session in `directory`, which may be new, made one of `request`.

        `warn` gets a sentence if the disk stops taking it. Raises `BloomdeskError` if it is another model's.
        """
        return Session(directory, self.weights.fingerprint, request, warn)

    def generate_all(
        self,
        prompts: Iterable[str | Sequence[int]],
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        sampling: Sampling = GREEDY,
        batch: int | None = None,
        speculate: str = LOOKUP,
        draft: Path | str | None = None,
        on_part: OnPart | None = None,
    ) -> Iterator[sequence.Sequence]:
        """Continuations of prompts that share their passes, up to `batch` of them at a time.

        Yields each sequence as soon as it is done, with its `request.number` among the prompts and, of several
        continuations, its `request.choice`; its tokens are those of its own run. What several of them begin with is
        computed once. Without a seed all have the same drawn one. By default `batch` is what the RAM suggests. Raises
        what `generate` raises, before the first pass.
        """
        sampling = sampling.seeded()
        requests = [
            request
            for number, prompt in enumerate(prompts)
            for request in self.requests(prompt, max_new_tokens, sampling, number)
        ]
        options = GenerationOptions(max_new_tokens, speculate, draft, batch)
        return self.batch(requests, options, on_part).run() if requests else iter(())

    def batch(
        self,
        requests: Sequence[Request],
        options: GenerationOptions,
        on_part: OnPart | None = None,
        kind: type[Batch] = Batch,
        session: Session | None = None,
    ) -> Batch:
        """A batch of `requests`, of which each has its own `max_new_tokens`; `session` is that of a single one.

        Raises what `generate` raises.
        """
        proposer = self._proposer(options)
        capacities = sorted((request.capacity for request in requests), reverse=True)
        base = self.memory_request(capacities, 0)
        prefixes, plan = _shared_if_it_fits(
            SharedPrefixes([request.prompt_ids for request in requests]),
            lambda prefixes: Planner(base, requests, proposer, prefixes).plan(options.batch),
        )
        return kind(self, requests, plan, prefixes, proposer, on_part, session)

    def live_batch(
        self,
        options: GenerationOptions,
        on_part: OnPart | None = None,
        on_begin: Callable[[], None] | None = None,
        reserved: int = 0,
    ) -> LiveBatch:
        """A batch without requests, which come and go; up to `options.batch` at a time.

        `on_begin` is called before each pass, and `reserved` bytes of RAM are for other things of the process. Raises
        `BloomdeskError` for an unsuitable draft, or too little RAM.
        """
        proposer = self._proposer(options)

        def base() -> MemoryRequest:
            found = self.memory_request([1], 0)
            return replace(found, process=found.process + reserved)

        return LiveBatch(self, base, proposer, options.batch, on_part, on_begin)

    def _proposer(self, options: GenerationOptions) -> Proposer:
        draft = None
        if options.draft:
            draft = DraftModel.open(Path(options.draft), self.weights, self.tokenizer)
        return Proposer(uses_ngrams=options.speculate == LOOKUP, draft=draft)

    def scorer(self, texts: Sequence[Text], on_part: OnPart | None = None) -> Scorer:
        """Scores texts of token ids, as many in a pass as the RAM has room for.

        Raises `BloomdeskError` if the RAM is too little for the longest.
        """
        base = self.memory_request([1], 1)
        prefixes, plan = _shared_if_it_fits(
            SharedPrefixes([text.ids for text in texts], ahead=1),
            lambda prefixes: plan_scoring(base, texts, prefixes),
        )
        return Scorer(self, texts, plan, on_part, prefixes)

    def requests(
        self,
        prompt_or_ids: str | Sequence[int],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        number: int = 0,
    ) -> list[Request]:
        """A checked request for each continuation of the prompt number `number`, of up to `max_new_tokens`.

        Raises `BloomdeskError` as `generate` does.
        """
        is_text = isinstance(prompt_or_ids, str)
        ids = self.tokenizer.encode(prompt_or_ids) if is_text else [int(i) for i in prompt_or_ids]
        if not ids:
            raise BloomdeskError("the prompt has no tokens", "give a prompt of at least one character")
        vocab_size = self.weights.model.vocab_size
        if outside := [i for i in ids if not 0 <= i < vocab_size]:
            raise BloomdeskError(f"token id {outside[0]} is outside the vocabulary of {vocab_size:,}")
        if max_new_tokens < 1:
            raise BloomdeskError(f"the number of new tokens must be at least 1, found {max_new_tokens}")
        if max_new_tokens > MOST_NEW_TOKENS:
            raise BloomdeskError(f"the number of new tokens must be at most {MOST_NEW_TOKENS:,}")
        if max_new_tokens < sampling.min_new_tokens:
            raise BloomdeskError(
                f"min_new_tokens, {sampling.min_new_tokens}, is more than max_new_tokens, {max_new_tokens}",
                "raise --max-new-tokens, or lower --min-new-tokens",
            )
        if foreign := [i for i in sampling.logit_bias if not 0 <= i < vocab_size]:
            raise BloomdeskError(
                f"the logit bias names token id {foreign[0]}, and the vocabulary has {vocab_size:,}"
            )
        sampling, token_bytes = sampling.seeded(), self.tokenizer.token_bytes
        grammar = self.grammars.of(sampling)
        return [
            Request(ids, max_new_tokens, sampling, number, choice, token_bytes, grammar)
            for choice in range(sampling.n)
        ]

    def stream(self, sequence: sequence.Sequence) -> TextStream | ScannedText:
        """The new text of a sequence as its tokens come."""
        return ScannedText(sequence.scanner) if sequence.request.sampling.stop else self.tokenizer.stream()

    def text(self, sequence: sequence.Sequence) -> str:
        """The new text of a sequence, without special tokens, up to a stop text."""
        if sequence.scanner.end is None:
            return self.tokenizer.decode(sequence.ids)
        return bytes(sequence.scanner.text[: sequence.scanner.end]).decode(errors="replace")


def _shared_if_it_fits(
    prefixes: SharedPrefixes, plan: Callable[[SharedPrefixes], MemoryPlan]
) -> tuple[SharedPrefixes, MemoryPlan]:
    """The plan with `prefixes` or, as sharing takes a little RAM for a pass, without any if that is too little."""
    try:
        return prefixes, plan(prefixes)
    except BloomdeskError:
        if not prefixes.positions:
            raise
        prefixes = SharedPrefixes([])
        return prefixes, plan(prefixes)
