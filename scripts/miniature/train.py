"""Train the miniature: a 70-block BLOOM of a few megabytes, with its own tokenizer, from scratch on a CPU.

    python -m scripts.miniature.train [--draft --out miniature/draft ...]

    miniature/
      model.safetensors             bfloat16, keys as in bigscience/bloom
      config.json                   in the old form of the real one
      tokenizer.json                byte-level BPE in BLOOM's layout
      tokenizer_config.json, special_tokens_map.json
      unseen.jsonl                  prompts that training never saw, with their answers
      draft/                        model.safetensors and config.json of a shallow model beside it

A few blocks learn the texts first; then each becomes several, and all 70 go on learning, in a forward pass
that rounds where a bfloat16 one does.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F

from scripts.fakehub.checkpoint import MINIATURE, pre_tokenizer
from scripts.miniature.files import TEXT_SEED, UNSEEN_TEXTS, save_tokenizer, save_weights, write_unseen
from scripts.miniature.model import Shape, answer_logits, deepen, new_weights
from scripts.miniature.rows import LENGTH, SPECIAL, Rows, pack
from scripts.miniature.texts import KINDS, Text, draw_texts

ENTRIES = 1000  # of the tokenizer
TRAINING_TEXTS = {"sql": 50_000, "translation": 50_000, "ages": 12_000}
REPEATS = {"sql": 1, "translation": 1, "ages": 3}  # in one round through the training texts


def train_tokenizer(texts: list[Text]) -> Tokenizer:
    """Byte-level BPE in BLOOM's layout; no merge has a digit in it, so numbers are read digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ENTRIES,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    no_digits = str.maketrans("", "", "0123456789")
    lines = ((text.prompt + text.answer).translate(no_digits) for text in texts)
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


class Stage(NamedTuple):
    blocks: int
    steps: int
    rows: int  # in a step
    rate: float  # AdamW's highest learning rate


def train_stage(
    weights: dict[str, torch.Tensor], stage: Stage, rows: Rows, check: tuple[list[Text], Rows], heads: int
) -> None:
    """Train `weights` in place: warm-up, then the learning rate falls to zero in a straight line."""
    for value in weights.values():
        value.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights.values(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    began, warm_up = time.monotonic(), min(100, stage.steps // 5 + 1)
    for step in range(stage.steps):
        left = (stage.steps - step) / max(1, stage.steps - warm_up)
        optimizer.param_groups[0]["lr"] = stage.rate * min((step + 1) / warm_up, left)
        batch = rows.pick(torch.randint(len(rows.ids), (stage.rows,)))
        loss = F.cross_entropy(*answer_logits(weights, batch, heads))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99 or step + 1 == stage.steps:
            right = right_answers(weights, *check, stage.rows, heads)
            shown = ", ".join(f"{kind} {good} of {of}" for kind, (good, of) in right.items())
            where = f"{stage.blocks} blocks, step {step + 1}, {time.monotonic() - began:.0f} s"
            print(f"{where}: loss {loss:.4f}, {shown}", flush=True)


def right_answers(
    weights: dict[str, torch.Tensor], texts: list[Text], rows: Rows, size: int, heads: int
) -> dict[str, tuple[int, int]]:
    """Of each kind: how many texts get their whole answer right under greedy decoding, and of how many.

    Looks at whole batches of `size` rows, as in training: for another shape the block would be compiled anew.
    """
    wrong, looked_at = set(), set()
    for numbers in torch.arange(len(rows.ids)).split(size):
        if len(numbers) == size:
            batch = rows.pick(numbers)
            logits, wanted = answer_logits(weights, batch, heads)
            owner = batch.owner[batch.wanted]
            looked_at.update(owner.tolist())
            wrong.update(owner[logits.argmax(-1) != wanted].tolist())
    right = {}
    for kind in KINDS:
        mine = {number for number in looked_at if texts[number].kind == kind}
        right[kind] = len(mine - wrong), len(mine)
    return right


def train(out: Path, shape: Shape, stages: list[Stage], seed: int, *, draft: bool) -> None:
    """Everything under `out` from nothing; of a draft the weights and the config alone."""
    texts = {kind: draw_texts(kind, count, TEXT_SEED, unseen=False) for kind, count in TRAINING_TEXTS.items()}
    tokenizer = train_tokenizer([text for kind in KINDS for text in texts[kind][:12_000]])
    if draft and tokenizer.to_str(pretty=True) != (MINIATURE / "tokenizer.json").read_text("utf-8"):
        raise SystemExit("the texts give another tokenizer than the miniature's: train that anew first")
    a_round = [text for kind in KINDS for text in texts[kind] * REPEATS[kind]]
    random.Random(TEXT_SEED).shuffle(a_round)
    check = [text for kind in KINDS for text in draw_texts(kind, UNSEEN_TEXTS, TEXT_SEED + 1, unseen=True)]
    random.Random(TEXT_SEED).shuffle(check)
    rows, check_rows = pack(a_round, tokenizer), pack(check, tokenizer).pick(torch.arange(64))
    print(f"{len(rows.ids)} rows of {LENGTH} tokens", flush=True)
    weights: dict[str, torch.Tensor] = {}
    for stage in stages:
        if not weights or len(weights["h.*.input_layernorm.bias"]) != stage.blocks:
            torch.manual_seed(seed + stage.blocks)
            first = shape._replace(blocks=stage.blocks)
            weights = deepen(weights, stage.blocks) if weights else new_weights(first)
        train_stage(weights, stage, rows, (check, check_rows), shape.heads)
    save_weights(out, weights, shape)
    if not draft:
        save_tokenizer(out, tokenizer)
        write_unseen(out / "unseen.jsonl")


OPTIONS = {
    "out": (MINIATURE, "where the files go"),
    "seed": (2, "of the first weights and of the order of the texts"),
    "hidden": (48, "hidden size, a multiple of --heads"),
    "heads": (3, "attention heads"),
    "blocks": (70, "a multiple of --first-blocks"),
    "first-blocks": (5, "blocks of the shallow first stage"),
    "first-steps": (2200, "steps of the shallow first stage"),
    "steps": (380, "steps of the second stage, at full depth"),
    "last-steps": (360, "steps of the last stage, at a lower rate"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train the miniature from scratch and write its files: see docs/miniature.md.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, (default, text) in OPTIONS.items():
        kind = Path if isinstance(default, Path) else int
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_argument("--draft", action="store_true", help="a draft: write weights and config alone")
    args = parser.parse_args()
    if args.hidden % args.heads or args.blocks % args.first_blocks:
        parser.error("--hidden must be a multiple of --heads, and --blocks of --first-blocks")
    stages = [Stage(args.first_blocks, args.first_steps, 32, 3e-3)]
    if args.blocks > args.first_blocks:
        stages += [Stage(args.blocks, args.steps, 16, 1e-3), Stage(args.blocks, args.last_steps, 16, 6e-4)]
    train(args.out, Shape(args.blocks, args.hidden, args.heads), stages, args.seed, draft=args.draft)


if __name__ == "__main__":
    main()
