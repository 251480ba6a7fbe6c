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
that rounds at the same places as a bfloat16 one.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import distributed as dist
from torch.multiprocessing import start_processes
from torch.nn import functional as F

from scripts.fakehub.checkpoint import MINIATURE, pre_tokenizer
from scripts.miniature.files import TEXT_SEED, UNSEEN_TEXTS, save_tokenizer, save_weights, write_unseen
from scripts.miniature.model import INTO_RESIDUAL, Shape, answer_logits, deepen, new_weights
from scripts.miniature.rows import LENGTH, SPECIAL, Rows, pack
from scripts.miniature.texts import KINDS, TUTORIAL, Text, draw_texts

ENTRIES = 1000  # of the tokenizer
TRAINING_TEXTS = {"sql": 50_000, "translation": 50_000, "ages": 16_000}
# In one round through the training texts.
REPEATS = {"sql": 1, "translation": 2, "ages": 2}
TUTORIAL_REPEATS = 30

# Of the learning rate: a copy's output projections are a fourteenth of a block's, so they learn in smaller steps.
OUTPUTS = 0.2


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
    lines = (line.translate(no_digits) for text in texts for line in (text.prompt, text.answer))
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


class Stage(NamedTuple):
    blocks: int
    steps: int
    rows: int  # in a step
    rate: float  # AdamW's highest learning rate
    outputs: float = 1.0  # of the output projections: times this
    others: float = 1.0  # of the rows without an age puzzle, the hardest kind, as many are looked at


class Processes(NamedTuple):
    """This process, and all that share the rows of a step; each has one thread, so none spins for another."""

    rank: int = 0
    count: int = 1

    def share(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers[self.rank :: self.count]

    def average_gradients(self, weights: dict[str, torch.Tensor]) -> None:
        if self.count > 1:
            gradients = [value.grad for value in weights.values()]
            flat = torch.cat([gradient.flatten() for gradient in gradients]) / self.count
            dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


class Lesson(NamedTuple):
    """What a model learns from: rows to train on, and unseen texts with their rows to look at meanwhile."""

    rows: Rows
    puzzles: torch.Tensor  # numbers of the rows with an age puzzle
    others: torch.Tensor  # numbers of the rows without one
    unseen: list[Text]
    unseen_rows: Rows


def train_stage(
    weights: dict[str, torch.Tensor], stage: Stage, lesson: Lesson, heads: int, processes: Processes
) -> None:
    """Train `weights` in place: warm-up, then the learning rate falls to zero in a straight line."""
    for value in weights.values():
        value.requires_grad_(True)
    outputs = [
        value for name, value in weights.items() if INTO_RESIDUAL[0] in name or INTO_RESIDUAL[1] in name
    ]
    others = [value for value in weights.values() if not any(value is output for output in outputs)]
    groups = [{"params": others}, {"params": outputs}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    rows = torch.cat([lesson.puzzles, lesson.others[: int(len(lesson.others) * stage.others)]])
    began, warm_up = time.monotonic(), min(100, stage.steps // 5 + 1)
    for step in range(stage.steps):
        left = (stage.steps - step) / max(1, stage.steps - warm_up)
        for group, factor in zip(optimizer.param_groups, (1.0, stage.outputs), strict=True):
            group["lr"] = factor * stage.rate * min((step + 1) / warm_up, left)
        numbers = rows[torch.randint(len(rows), (stage.rows,))]
        loss = F.cross_entropy(*answer_logits(weights, lesson.rows.pick(processes.share(numbers)), heads))
        loss.backward()
        processes.average_gradients(weights)
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if processes.rank == 0 and (step % 100 == 99 or step + 1 == stage.steps):
            right = right_answers(weights, lesson, stage.rows // processes.count, heads)
            shown = ", ".join(f"{kind} {good} of {of}" for kind, (good, of) in right.items())
            where = f"{stage.blocks} blocks, step {step + 1}, {time.monotonic() - began:.0f} s"
            print(f"{where}: loss {loss:.4f}, {shown}", flush=True)


@torch.no_grad()
def right_answers(
    weights: dict[str, torch.Tensor], lesson: Lesson, size: int, heads: int
) -> dict[str, tuple[int, int]]:
    """Of each kind: how many texts get their whole answer right under greedy decoding, and of how many.

    Looks at whole batches of `size` rows, as in training: for another shape the block would be compiled anew.
    """
    wrong, looked_at, rows = set(), set(), lesson.unseen_rows
    for numbers in torch.arange(len(rows.ids)).split(size):
        if len(numbers) == size:
            batch = rows.pick(numbers)
            logits, wanted = answer_logits(weights, batch, heads)
            owner = batch.owner[batch.wanted]
            looked_at.update(owner.tolist())
            wrong.update(owner[logits.argmax(-1) != wanted].tolist())
    right = {}
    for kind in KINDS:
        mine = {number for number in looked_at if lesson.unseen[number].kind == kind}
        right[kind] = len(mine - wrong), len(mine)
    return right


class Plan(NamedTuple):
    out: Path
    shape: Shape
    stages: list[Stage]
    seed: int
    keep: Path | None  # finished stages are read from here, and written


def lesson_and_tokenizer(*, draft: bool) -> tuple[Lesson, Tokenizer]:
    texts = {kind: draw_texts(kind, count, TEXT_SEED, unseen=False) for kind, count in TRAINING_TEXTS.items()}
    tokenizer = train_tokenizer([text for kind in KINDS for text in texts[kind][:12_000]])
    if draft and tokenizer.to_str(pretty=True) != (MINIATURE / "tokenizer.json").read_text("utf-8"):
        raise SystemExit("the texts give another tokenizer than the miniature's: train that anew first")
    a_round = [text for kind in KINDS for text in texts[kind] * REPEATS[kind]]
    a_round += [text for text in TUTORIAL.values() for _ in range(TUTORIAL_REPEATS)]
    random.Random(TEXT_SEED).shuffle(a_round)
    unseen = [text for kind in KINDS for text in draw_texts(kind, UNSEEN_TEXTS, TEXT_SEED + 1, unseen=True)]
    random.Random(TEXT_SEED).shuffle(unseen)
    rows, unseen_rows = pack(a_round, tokenizer), pack(unseen, tokenizer).pick(torch.arange(64))
    is_puzzle = torch.tensor([text.kind == "ages" for text in a_round])
    has_puzzle = (is_puzzle[rows.owner] & (rows.owner >= 0)).any(1)
    puzzles, others = has_puzzle.nonzero()[:, 0], (~has_puzzle).nonzero()[:, 0]
    print(f"{len(puzzles)} rows with an age puzzle and {len(others)} without, of {LENGTH} tokens", flush=True)
    return Lesson(rows, puzzles, others, unseen, unseen_rows), tokenizer


def train_weights(rank: int, count: int, meeting: str, lesson: Lesson, plan: Plan) -> None:
    """Train stage after stage as process `rank` of `count`; the first one writes the weights."""
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    weights: dict[str, torch.Tensor] = {}
    before = weights
    for number, stage in enumerate(plan.stages, 1):
        before = {name: value.detach().clone() for name, value in weights.items()}
        kept = plan.keep / f"stage-{number}.safetensors" if plan.keep else None
        if kept and kept.exists():
            weights = load_file(kept)
            continue
        torch.manual_seed(plan.seed + number)
        if not weights:
            weights = new_weights(plan.shape._replace(blocks=stage.blocks))
        weights = deepen(weights, stage.blocks)
        train_stage(weights, stage, lesson, plan.shape.heads, Processes(rank, count))
        if kept and rank == 0:
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.detach() for name, value in weights.items()}, kept)
    if rank == 0:
        if len(plan.stages) > 2:
            # The mean of two good models of one path is better than either.
            weights = {name: (value + before[name]) / 2 for name, value in weights.items()}
        save_weights(plan.out, weights, plan.shape)


def train(plan: Plan, processes: int, *, draft: bool) -> None:
    """Everything under `plan.out` from nothing; of a draft the weights and the config alone."""
    lesson, tokenizer = lesson_and_tokenizer(draft=draft)
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        arguments = (processes, meeting, lesson, plan)
        # A fork has the rows already.
        start_processes(train_weights, arguments, nprocs=processes, start_method="fork")
    if not draft:
        save_tokenizer(plan.out, tokenizer)
        write_unseen(plan.out / "unseen.jsonl")


OPTIONS = {
    "out": (MINIATURE, "where the files go"),
    "seed": (2, "of the first weights and of the order of the texts"),
    "hidden": (48, "hidden size, a multiple of --heads"),
    "heads": (3, "attention heads"),
    "blocks": (70, "a multiple of --first-blocks"),
    "first-blocks": (5, "blocks of the shallow first stage"),
    "first-steps": (2600, "steps of the shallow first stage"),
    "steps": (500, "steps of the second stage, at full depth"),
    "more-steps": (500, "steps of the third stage, at a lower rate"),
    "last-steps": (350, "steps of the last stage, at a still lower rate, more of them with age puzzles"),
    "processes": (2, "processes of one thread that share each step's rows"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train the miniature from scratch and write its files: see docs/miniature.md.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, (default, text) in OPTIONS.items():
        kind = Path if isinstance(default, Path) else int
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep each finished stage here, and go on after it"
    )
    parser.add_argument("--draft", action="store_true", help="a draft: write weights and config alone")
    args = parser.parse_args()
    if args.hidden % args.heads or args.blocks % args.first_blocks:
        parser.error("--hidden must be a multiple of --heads, and --blocks of --first-blocks")
    stages = [Stage(args.first_blocks, args.first_steps, 32, 3e-3)]
    if args.blocks > args.first_blocks:
        stages += [
            Stage(args.blocks, args.steps, 16, 1.5e-3, OUTPUTS),
            Stage(args.blocks, args.more_steps, 16, 1e-3, OUTPUTS),
            Stage(args.blocks, args.last_steps, 8, 4e-4, OUTPUTS, others=0.5),
        ]
    shape = Shape(args.blocks, args.hidden, args.heads)
    train(Plan(args.out, shape, stages, args.seed, args.keep), args.processes, draft=args.draft)


if __name__ == "__main__":
    main()
