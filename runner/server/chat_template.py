"""The tokenizer's chat template: messages become the text that the model was trained to continue."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runner.errors import BloomdeskError
from runner.format.safetensors import read_text

# Bytes.
LARGEST_TEMPLATE = 2**20
CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """A Jinja template, as transformers reads it, in a sandbox: it gets at nothing but the messages."""

    def __init__(self, text: str, special_tokens: Mapping[str, str], origin: str) -> None:
        """`origin` names where the text is from. Raises `BloomdeskError` if it is no template."""
        self.text = text
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _as_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now, **special_tokens}
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise BloomdeskError(f"{origin} is not a chat template: {error}") from None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text that the model continues. Raises `BloomdeskError` if the template takes no such messages."""
        try:
            return self._template.render(messages=messages, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError, LookupError, OverflowError, RecursionError) as error:
            raise BloomdeskError(f"the chat template refuses these messages: {error}") from None


def load_template(directory: Path, file: Path | None = None) -> ChatTemplate | None:
    """The template in `file`, or else that of the prepared directory, if it has one.

    Raises `BloomdeskError` if it cannot be read, or is none.
    """
    config = tokenizer_config(directory)
    special = {name: token for name in SPECIAL_TOKENS if (token := special_token(config, name))}
    for path in filter(None, (file, directory / TEMPLATE)):
        if path is file or path.exists():
            return ChatTemplate(read_text(path, LARGEST_TEMPLATE), special, str(path))
    text = config.get("chat_template")
    if isinstance(text, list):
        named = {each.get("name"): each.get("template") for each in text if isinstance(each, dict)}
        text = named.get("default")
    if not isinstance(text, str):
        return None
    return ChatTemplate(text, special, str(directory / CONFIG))


def tokenizer_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, or nothing if there is none."""
    path = directory / CONFIG
    if not path.exists():
        return {}
    try:
        found = json.loads(read_text(path, LARGEST_TEMPLATE))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BloomdeskError(f"{path} is not a JSON object")
    return found


def special_token(config: Mapping[str, Any], name: str) -> str | None:
    """The text of a special token, which may be an object that has it as its content."""
    token = config.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _as_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
