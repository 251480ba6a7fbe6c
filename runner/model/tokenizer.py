"""tokenizer.json: text to token ids, and a growing list of token ids to text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers.decoders import ByteLevel, DecodeStream

from runner.errors import BloomdeskError, in_shell, reading
from runner.format.safetensors import read_small

# Bytes. BLOOM's tokenizer.json has 14.5 MB.
LARGEST_TOKENIZER = 2**26
# In tokens, a printable byte stands as its own character, and the others as characters from 256 on.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF_CHARACTER = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + place): byte for place, byte in enumerate(_OTHERS)
}


def parse_tokenizer(path: Path, data: bytes, hint: str) -> tokenizers.Tokenizer:
    """The tokenizer of these bytes; `path` only names it.

    Raises `BloomdeskError` with `hint` if it is not of BLOOM's kind.
    """
    try:
        found = tokenizers.Tokenizer.from_buffer(data)
    except BaseException as error:
        # The library raises plain Exception, and a BaseException if it panics.
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        reason = str(error)[:200].encode("unicode_escape").decode()
        raise BloomdeskError(f"{path} is not a tokenizer: {reason}", hint) from None
    if found.normalizer is not None or not isinstance(found.decoder, ByteLevel):
        # A chain of replacements can make a text of any length.
        raise BloomdeskError(f"{path} is not a tokenizer of BLOOM: it rewrites texts", hint)
    return found


class Tokenizer:
    """The tokenizer that the checkpoint came with."""

    def __init__(self, path: Path) -> None:
        """Raises `BloomdeskError` if the file is missing, or is not a tokenizer of BLOOM's kind."""
        repair = f"see what is damaged: bloomdesk verify {in_shell(path.parent)}"
        with reading(path, repair):
            data = read_small(path, LARGEST_TOKENIZER)
        self._tokenizer = parse_tokenizer(path, data, repair)
        # Padding could make a prompt of any length.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of every token."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text: str, *, adds_special: bool = True) -> list[int]:
        """Token ids of `text`, with what the tokenizer's post-processor adds; BLOOM's adds nothing.

        Without `adds_special`, nothing is added.

        Raises `BloomdeskError` if it is not valid Unicode.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=adds_special).ids
        except (UnicodeEncodeError, TypeError) as error:
            # The library raises these for a lone surrogate.
            raise BloomdeskError("the prompt is not valid UTF-8 text") from error

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; none for a special token, or an id without a token."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._tokenizer.get_added_tokens_decoder():
            return b""
        return bytes(BYTE_OF_CHARACTER[character] for character in token)

    def token_name(self, token_id: int) -> str | None:
        """The token as tokenizer.json names it: "</s>", or bytes as printable characters; None without a token."""
        return self._tokenizer.id_to_token(token_id)

    def to_json(self) -> str:
        """The tokenizer as tokenizer.json has it."""
        return self._tokenizer.to_str()

    def stream(self) -> TextStream:
        """A decoder for ids that come one at a time."""
        return TextStream(self._tokenizer)


class TextStream:
    """Text from ids that come one at a time; a character that several tokens encode is held back until it is whole."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._emitted = ""

    def push(self, token_id: int) -> str:
        """The text that this id completes; often empty inside a character."""
        self._ids.append(token_id)
        text = self._stream.step(self._tokenizer, token_id) or ""
        self._emitted += text
        return text

    def finish(self) -> str:
        """The text that is still held back: incomplete characters as replacement characters."""
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)[len(self._emitted) :]
