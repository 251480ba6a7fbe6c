"""The miniature's texts as rows of token ids, for training and for judging.

Shapes in comments: B texts, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from scripts.miniature.texts import Text

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
EOS, PAD = 2, 3
LENGTH = 120  # tokens in a row: the longest age puzzle fits


class Rows(NamedTuple):
    """Texts as token ids, several in a row; none sees another."""

    ids: torch.Tensor  # [B, T]
    owner: torch.Tensor  # [B, T]: the number of the text, -1 for padding
    place: torch.Tensor  # [B, T]: the position in the text
    wanted: torch.Tensor  # [B, T] bool: the tokens of the answer and its </s>

    def pick(self, numbers: torch.Tensor) -> Rows:
        return Rows(*(field[numbers] for field in self))


def pack(texts: list[Text], tokenizer: Tokenizer) -> Rows:
    """Encode texts and put each into the first of the last few rows that has room for it.

    Prompt and answer are encoded apart, as generating does: a space at the prompt's end stays a token.
    """
    prompts = tokenizer.encode_batch([text.prompt for text in texts])
    answers = tokenizer.encode_batch([text.answer for text in texts])
    rows: list[list[tuple[int, int, int, bool]]] = []
    open_rows: list[int] = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = [*prompt.ids, *answer.ids, EOS]
        text = [(token, number, place, place >= len(prompt.ids)) for place, token in enumerate(ids)]
        room = (row for row in open_rows if len(rows[row]) + len(text) <= LENGTH)
        row = next(room, len(rows))
        if row == len(rows):
            rows.append([])
            open_rows = [*open_rows[-30:], row]
        rows[row] += text
    padded = torch.tensor([row + [(PAD, -1, 0, False)] * (LENGTH - len(row)) for row in rows])
    ids, owner, place, wanted = padded.unbind(2)
    return Rows(ids, owner, place, wanted.bool())
