"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them: what lm-evaluation-harness asks for."""

from __future__ import annotations

from typing import Any

from runner.errors import BloomdeskError
from runner.generation.model import Model
from runner.server.chat_template import SPECIAL_TOKENS, special_token
from runner.server.choices import text_of
from runner.server.errors import bad_request, explained
from runner.server.orders import model_named
from runner.server.schemas import DetokenizeBody, TokenizeBody
from runner.server.settings import Settings


def tokenized(body: TokenizeBody, model: Model, settings: Settings) -> dict[str, Any]:
    """The token ids of a text."""
    model_named(body.model, settings)
    try:
        ids = model.tokenizer.encode(body.prompt, adds_special=body.add_special_tokens is not False)
    except BloomdeskError as error:
        raise explained(error, "prompt") from None
    return {"tokens": ids, "count": len(ids)}


def detokenized(body: DetokenizeBody, model: Model, settings: Settings) -> dict[str, Any]:
    """The text of token ids, with special tokens."""
    model_named(body.model, settings)
    vocab_size = model.weights.model.vocab_size
    if outside := [token for token in body.tokens if token >= vocab_size]:
        raise bad_request(f"token id {outside[0]} is outside the vocabulary of {vocab_size:,}", "tokens")
    return {"prompt": text_of(model.tokenizer, body.tokens)}


def tokenizer_info(model: Model, settings: Settings) -> dict[str, Any]:
    """What the tokenizer's own file says, with the special tokens as texts, and the chat template in use."""
    config = settings.tokenizer_config
    special = {name: token for name in SPECIAL_TOKENS if (token := special_token(config, name))}
    if "eos_token" not in special and (ends := sorted(model.weights.model.eos_token_ids)):
        special["eos_token"] = model.tokenizer.token_name(ends[0])
    template = settings.chat_template.text if settings.chat_template else None
    return {**config, **special, "chat_template": template, "vocab_size": model.weights.model.vocab_size}
