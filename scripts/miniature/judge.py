"""Judge the miniature, or a draft beside it: how many unseen answers are right.

python -m scripts.miniature.judge [DIR]            greedy answers of transformers' BLOOM, exactly right or not
python -m scripts.miniature.judge DIR --agree      how often a draft's next token is the miniature's
python -m scripts.miniature.judge [DIR] --ablate   what changes without each block, and without each two neighbours
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

from scripts.fakehub.checkpoint import MINIATURE
from scripts.miniature.files import padding_tokenizer, read_stacked, shared_file, unseen_lines
from scripts.miniature.model import answer_logits
from scripts.miniature.rows import EOS, LENGTH, pack
from scripts.miniature.texts import KINDS, Text

if TYPE_CHECKING:
    from transformers import BloomForCausalLM


class Greedy(NamedTuple):
    """Prompts, padded on the left, with their greedy answers."""

    ids: torch.Tensor  # [B, T]
    mask: torch.Tensor  # [B, start]: 0 for padding
    start: int  # of the answers

    @property
    def answers(self) -> list[list[int]]:
        """The answers' ids, each up to its `</s>` if it has one."""
        rows = self.ids[:, self.start :].tolist()
        return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


def load(path: Path) -> BloomForCausalLM:
    from transformers import BloomForCausalLM

    return BloomForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()


def greedy(model: BloomForCausalLM, tokenizer: Tokenizer, lines: list[dict[str, str]]) -> Greedy:
    """The greedy answers of transformers' BLOOM to the lines' prompts."""
    encoded = tokenizer.encode_batch([line["prompt"] for line in lines])
    ids = torch.tensor([prompt.ids for prompt in encoded])
    mask = torch.tensor([prompt.attention_mask for prompt in encoded])
    given = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=LENGTH)
    return Greedy(given, mask, ids.shape[1])


def judge(out: Path) -> None:
    """Print how many unseen answers transformers' BLOOM gives exactly: bfloat16, greedy."""
    tokenizer, lines, model = padding_tokenizer(out), unseen_lines(out), load(out)
    for kind in KINDS:
        mine = [line for line in lines if line["kind"] == kind]
        wrong = []
        for line, answer in zip(mine, greedy(model, tokenizer, mine).answers, strict=True):
            got = tokenizer.decode(answer)
            if got != line["answer"] or EOS not in answer:
                wrong.append(f"  {line['prompt']}\n    wanted {line['answer']!r}\n    got    {got!r}")
        right = len(mine) - len(wrong)
        print(f"{kind}: {right} of {len(mine)} ({right / len(mine):.1%})", *wrong, sep="\n")


@torch.no_grad()
def agree(out: Path, whole: Path) -> None:
    """Print how often the draft's next token is the one that the model in `whole` gives, along its answers."""
    tokenizer, lines = padding_tokenizer(whole), unseen_lines(whole)
    draft, model = load(out), load(whole)
    for kind in KINDS:
        given = greedy(model, tokenizer, [line for line in lines if line["kind"] == kind])
        mask = F.pad(given.mask, (0, given.ids.shape[1] - given.start), value=1)
        proposed = draft(given.ids, attention_mask=mask).logits[:, given.start - 1 : -1].argmax(-1)
        answers = zip(given.answers, proposed.tolist(), strict=True)
        pairs = [token == mine for answer, row in answers for token, mine in zip(answer, row, strict=False)]
        print(f"{kind}: {sum(pairs)} of {len(pairs)} tokens ({sum(pairs) / len(pairs):.1%})")


class Ablation(NamedTuple):
    """What changes when blocks are left out, along the answers of all blocks."""

    without: tuple[int, ...]
    answers: int  # that become others
    logits: float  # root mean square of the logits' change


@torch.no_grad()
def ablations(out: Path, lines: list[dict[str, str]], which: Iterable[tuple[int, ...]]) -> Iterator[Ablation]:
    """Leave out each of `which` in turn and compare with all blocks, along their own greedy answers to `lines`.

    An answer changes if, anywhere along it, the most likely token becomes another one.
    """
    tokenizer = padding_tokenizer(out)
    answers = greedy(load(out), tokenizer, lines).answers
    texts = [
        Text(line["kind"], line["prompt"], tokenizer.decode(answer), "")
        for line, answer in zip(lines, answers, strict=True)
    ]
    rows = pack(texts, Tokenizer.from_file(str(shared_file(out, "tokenizer.json"))))
    weights, heads = read_stacked(out)
    whole, _ = answer_logits(weights, rows, heads)
    owner, chosen = rows.owner[rows.wanted], whole.argmax(-1)
    for without in which:
        logits, _ = answer_logits(weights, rows, heads, without)
        changed = owner[logits.argmax(-1) != chosen].unique()
        yield Ablation(without, len(changed), (logits - whole).square().mean().sqrt().item())


def ablate(out: Path) -> None:
    """Print what changes in the answers to unseen prompts without each block, and without each two neighbours."""
    lines = unseen_lines(out)
    blocks = len(read_stacked(out)[0]["h.*.input_layernorm.bias"])
    singles = [(number,) for number in range(blocks)]
    pairs = [(number, number + 1) for number in range(blocks - 1)]
    for found in ablations(out, lines, singles + pairs):
        what = " and ".join(map(str, found.without))
        print(
            f"without {what}: {found.answers} of {len(lines)} answers, logits by {found.logits:.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge the miniature, or a draft beside it.")
    parser.add_argument("directory", type=Path, nargs="?", default=MINIATURE, metavar="DIR")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--agree", action="store_true", help="compare it with the miniature's answers")
    what.add_argument("--ablate", action="store_true", help="compare it without some of its blocks")
    given = parser.parse_args()
    if given.agree:
        agree(given.directory, MINIATURE)
    elif given.ablate:
        ablate(given.directory)
    else:
        judge(given.directory)


if __name__ == "__main__":
    main()
