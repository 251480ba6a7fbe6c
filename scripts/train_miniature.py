"""Train the miniature: a 70-block BLOOM of a few megabytes, with its own tokenizer, from scratch on a CPU.

    miniature/
      model.safetensors             bfloat16, keys as in bigscience/bloom
      config.json                   in the old form of the real one
      tokenizer.json                byte-level BPE in BLOOM's layout
      tokenizer_config.json, special_tokens_map.json
      unseen.jsonl                  prompts that training never saw, with their answers
      draft/                        model.safetensors and config.json of a shallow model beside it

A few blocks learn the texts first; then each becomes several, and all 70 go on learning, in a forward pass
that rounds where a bfloat16 one does.

Shapes in comments: B texts, T tokens, H heads, D head dim, E hidden, L blocks, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from miniature_texts import KINDS, Text, draw_texts
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    from transformers import BloomForCausalLM

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
EOS, PAD = 2, 3
ENTRIES, ROWS = 1000, 1024  # the embedding has rows to spare, as the real one has
EPSILON = 1e-5
LENGTH = 104  # tokens in a row: the longest age puzzle fits
TEXT_SEED = 0  # fixed, so that every model trained here gets the same tokenizer
TRAINING_TEXTS = {"sql": 50_000, "translation": 50_000, "ages": 12_000}
REPEATS = {"sql": 1, "translation": 1, "ages": 3}  # in one round through the training texts
UNSEEN_TEXTS = 150  # of each kind
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "miniature"


class Shape(NamedTuple):
    blocks: int
    hidden: int
    heads: int


# --- Tokenizer


def train_tokenizer(texts: list[Text]) -> Tokenizer:
    """Byte-level BPE in BLOOM's layout; no merge has a digit in it, so numbers are read digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?[^(\s|[.,!?…。，、।۔،])]+"), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ENTRIES,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    no_digits = str.maketrans("", "", "0123456789")
    tokenizer.train_from_iterator(
        ((text.prompt + text.answer).translate(no_digits) for text in texts), trainer
    )
    return tokenizer


# --- Data


class Rows(NamedTuple):
    """Texts as token ids, several in a row; none sees another."""

    ids: torch.Tensor  # [B, T]
    owner: torch.Tensor  # [B, T]: the number of the text, -1 for padding
    place: torch.Tensor  # [B, T]: the position in the text
    wanted: torch.Tensor  # [B, T] bool: the tokens of the answer and its </s>

    def pick(self, numbers: torch.Tensor) -> Rows:
        return Rows(*(field[numbers] for field in self))


def pack(texts: list[Text], tokenizer: Tokenizer) -> Rows:
    """Encode texts and put each into the first of the last few rows that has room for it."""
    prompts = tokenizer.encode_batch([text.prompt for text in texts])
    wholes = tokenizer.encode_batch([text.prompt + text.answer for text in texts])
    rows: list[list[tuple[int, int, int, bool]]] = []
    open_rows: list[int] = []
    for number, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True)):
        ids = [*whole.ids, EOS]
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


# --- The model: BLOOM, for training only


def block_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    """The 12 tensors of a block, in the order of use."""
    return {
        "input_layernorm.weight": (hidden,),
        "input_layernorm.bias": (hidden,),
        "self_attention.query_key_value.weight": (3 * hidden, hidden),
        "self_attention.query_key_value.bias": (3 * hidden,),
        "self_attention.dense.weight": (hidden, hidden),
        "self_attention.dense.bias": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "post_attention_layernorm.bias": (hidden,),
        "mlp.dense_h_to_4h.weight": (4 * hidden, hidden),
        "mlp.dense_h_to_4h.bias": (4 * hidden,),
        "mlp.dense_4h_to_h.weight": (hidden, 4 * hidden),
        "mlp.dense_4h_to_h.bias": (hidden,),
    }


INTO_RESIDUAL = ("self_attention.dense.", "mlp.dense_4h_to_h.")


def new_weights(shape: Shape) -> dict[str, torch.Tensor]:
    """Random weights by their names in the checkpoint; all blocks are stacked: `h.*.name` is [L, ...]."""
    hidden = shape.hidden
    weights = {"word_embeddings.weight": torch.randn(ROWS, hidden) * 0.1}
    for name in ("word_embeddings_layernorm", "ln_f"):
        weights |= {f"{name}.weight": torch.ones(hidden), f"{name}.bias": torch.zeros(hidden)}
    for name, size in block_shapes(hidden).items():
        if len(size) == 1:
            value = torch.full((shape.blocks, *size), float("layernorm.weight" in name))
        else:
            value = torch.randn(shape.blocks, *size) / math.sqrt(size[1])
            if name.startswith(INTO_RESIDUAL):
                value /= math.sqrt(2 * shape.blocks)
        weights[f"h.*.{name}"] = value
    return weights


def alibi_slopes(heads: int) -> torch.Tensor:
    """The ALiBi slopes [H] for any number of heads (Press et al., 2022, as BLOOM uses them)."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes)


def to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """Round float32 to bfloat16's 8 bits; the gradient passes straight through.

    Veltkamp's splitting instead of two casts: a compiler may drop a cast there and back.
    """
    with torch.no_grad():
        scaled = x * 65537.0
        step = scaled - (scaled - x) - x
    return x + step


def block(
    x: torch.Tensor, alibi: torch.Tensor, mask: torch.Tensor, w: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """One transformer block: x [B, T, E], ALiBi [B, H, 1, T] and the mask [B, 1, T, T] give [B, T, E]."""
    r = to_bfloat16
    batch, length, hidden = x.shape
    heads = alibi.shape[1]
    normed = r(F.layer_norm(x, (hidden,), w[0], w[1], EPSILON))
    fused = r(F.linear(normed, w[2], w[3])).view(batch, length, heads, 3, hidden // heads)
    q, k, v = fused.permute(3, 0, 2, 1, 4)  # each [B, H, T, D]
    scores = r(alibi + q @ k.transpose(-1, -2) / math.sqrt(hidden // heads))  # [B, H, T, T]
    seen = r(r(torch.softmax(scores + mask, dim=-1)) @ v).transpose(1, 2).reshape(batch, length, hidden)
    x = r(x + r(F.linear(seen, w[4], w[5])))
    normed = r(F.layer_norm(x, (hidden,), w[6], w[7], EPSILON))
    inner = r(F.gelu(r(F.linear(normed, w[8], w[9])), approximate="tanh"))
    return r(x + r(F.linear(inner, w[10], w[11])))


compiled_block = torch.compile(block, dynamic=False)


def forward(weights: dict[str, torch.Tensor], rows: Rows, heads: int, without: int = -1) -> torch.Tensor:
    """Rows of B x T tokens to the last hidden states [B, T, E]; `without` leaves one block out."""
    r = to_bfloat16
    weights = {name: r(value) for name, value in weights.items()}
    embedding = weights["word_embeddings.weight"]
    size = embedding.shape[1:]
    alibi = r(
        alibi_slopes(heads)[:, None, None] * rows.place[:, None, None]
    )  # by the key's place, as in BLOOM
    hidden = (rows.owner[:, :, None] != rows.owner[:, None]) | torch.ones(LENGTH, LENGTH).triu(1).bool()
    mask = torch.zeros(hidden.shape).masked_fill(hidden, -1e9)[:, None]
    norm = weights["word_embeddings_layernorm.weight"], weights["word_embeddings_layernorm.bias"]
    x = r(F.layer_norm(F.embedding(rows.ids, embedding), size, *norm, EPSILON))
    stacked = [value.unbind(0) for name, value in weights.items() if name.startswith("h.*.")]
    for number, w in enumerate(zip(*stacked, strict=True)):
        if number != without:
            x = compiled_block(x, alibi, mask, w)
    return r(F.layer_norm(x, size, weights["ln_f.weight"], weights["ln_f.bias"], EPSILON))


def answer_logits(
    weights: dict[str, torch.Tensor], rows: Rows, heads: int, without: int = -1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] and ids [N] of the N answer tokens in `rows`."""
    hidden = forward(weights, rows, heads, without)
    before = hidden[:, :-1][rows.wanted[:, 1:]]
    embedding = weights["word_embeddings.weight"]
    return F.linear(before, to_bfloat16(embedding)), rows.ids[rows.wanted]


def deepen(weights: dict[str, torch.Tensor], blocks: int) -> dict[str, torch.Tensor]:
    """Put copies after each block until there are `blocks`; a copy adds nothing yet, so the logits stay."""
    deeper = {}
    for name, value in weights.items():
        if name.startswith("h.*."):
            times = blocks // len(value)
            value = value.repeat_interleave(times, dim=0)
            if name[4:].startswith(INTO_RESIDUAL):
                value[torch.arange(blocks) % times != 0] = 0
        deeper[name] = value.detach().clone()
    return deeper


# --- Training


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
            spent = time.monotonic() - began
            print(
                f"{stage.blocks} blocks, step {step + 1}, {spent:.0f} s: loss {loss:.4f}, {shown}", flush=True
            )


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


# --- The files


def save_weights(out: Path, weights: dict[str, torch.Tensor], shape: Shape) -> None:
    """Write weights and config as the Hub has the real ones: bfloat16, no prefix, no head of its own."""
    tensors = {}
    for name, value in weights.items():
        if name.startswith("h.*."):
            tensors |= {name.replace("*", str(number)): part for number, part in enumerate(value.unbind(0))}
        else:
            tensors[name] = value
    tensors = {name: value.detach().bfloat16().contiguous() for name, value in tensors.items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    write_json(out / "config.json", config_of(shape))


def save_tokenizer(out: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(out / "tokenizer.json"))
    special = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    write_json(out / "special_tokens_map.json", special)
    tokenizer_config = {
        "tokenizer_class": "BloomTokenizerFast",
        "padding_side": "left",
        "name_or_path": "miniature",
    }
    write_json(out / "tokenizer_config.json", special | tokenizer_config)


def config_of(shape: Shape) -> dict[str, object]:
    """config.json with the names, and without the dtype, of bigscience/bloom's."""
    return {
        "apply_residual_connection_post_layernorm": False,
        "architectures": ["BloomModel"],
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bos_token_id": SPECIAL.index("<s>"),
        "eos_token_id": EOS,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "layer_norm_epsilon": EPSILON,
        "masked_softmax_fusion": True,
        "model_type": "bloom",
        "n_embed": shape.hidden,
        "n_layer": shape.blocks,
        "num_attention_heads": shape.heads,
        "pad_token_id": PAD,
        "pretraining_tp": 1,
        "slow_but_exact": False,
        "use_cache": True,
        "vocab_size": ROWS,
    }


def write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_unseen(path: Path) -> None:
    """The prompts for judging, one object a line."""
    texts = [text for kind in KINDS for text in draw_texts(kind, UNSEEN_TEXTS, TEXT_SEED, unseen=True)]
    lines = [{"kind": text.kind, "prompt": text.prompt, "answer": text.answer} for text in texts]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(content, encoding="utf-8")


def read_stacked(out: Path) -> tuple[dict[str, torch.Tensor], int]:
    """The saved weights as training has them, and the number of heads."""
    saved = {name: value.float() for name, value in load_file(out / "model.safetensors").items()}
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    weights = {name: value for name, value in saved.items() if not name.startswith("h.")}
    for name in block_shapes(config["n_embed"]):
        parts = [saved[f"h.{number}.{name}"] for number in range(config["n_layer"])]
        weights[f"h.*.{name}"] = torch.stack(parts)
    return weights, config["num_attention_heads"]


# --- Judging


def shared_file(out: Path, name: str) -> Path:
    """The file of the model in `out`; the miniature's where a draft has none of its own."""
    return out / name if (out / name).exists() else DEFAULT_OUT / name


def unseen_lines(out: Path) -> list[dict[str, str]]:
    text = shared_file(out, "unseen.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def padding_tokenizer(out: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(shared_file(out, "tokenizer.json")))
    tokenizer.enable_padding(direction="left", pad_id=PAD, pad_token=SPECIAL[PAD])
    return tokenizer


class Greedy(NamedTuple):
    """Prompts, padded on the left, with their greedy answers."""

    ids: torch.Tensor  # [B, T]
    mask: torch.Tensor  # [B, start]: 0 for padding
    start: int  # of the answers

    @property
    def answers(self) -> list[list[int]]:
        """The answers' ids up to `</s>`, which is the last of each that has one."""
        rows = self.ids[:, self.start :].tolist()
        return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


def greedy(model: BloomForCausalLM, tokenizer: Tokenizer, prompts: list[str]) -> Greedy:
    """What transformers' BLOOM answers."""
    encoded = tokenizer.encode_batch(prompts)
    ids = torch.tensor([prompt.ids for prompt in encoded])
    mask = torch.tensor([prompt.attention_mask for prompt in encoded])
    given = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=LENGTH)
    return Greedy(given, mask, ids.shape[1])


def judge(out: Path) -> None:
    """Print how many unseen answers transformers' BLOOM gives exactly: bfloat16, greedy."""
    from transformers import BloomForCausalLM

    tokenizer, lines = padding_tokenizer(out), unseen_lines(out)
    model = BloomForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
    for kind in KINDS:
        mine = [line for line in lines if line["kind"] == kind]
        wrong = []
        answers = greedy(model, tokenizer, [line["prompt"] for line in mine]).answers
        for line, answer in zip(mine, answers, strict=True):
            got = tokenizer.decode(answer)
            if got != line["answer"] or EOS not in answer:
                wrong.append(f"  {line['prompt']}\n    wanted {line['answer']!r}\n    got    {got!r}")
        print(
            f"{kind}: {len(mine) - len(wrong)} of {len(mine)} ({1 - len(wrong) / len(mine):.1%})",
            *wrong,
            sep="\n",
        )


@torch.no_grad()
def agree(out: Path, whole: Path) -> None:
    """Print how often the draft's next token is the one that the model in `whole` gives, along its answers."""
    from transformers import BloomForCausalLM

    tokenizer, lines = padding_tokenizer(whole), unseen_lines(whole)
    draft, model = (
        BloomForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval() for path in (out, whole)
    )
    for kind in KINDS:
        given = greedy(model, tokenizer, [line["prompt"] for line in lines if line["kind"] == kind])
        mask = F.pad(given.mask, (0, given.ids.shape[1] - given.start), value=1)
        proposed = draft(given.ids, attention_mask=mask).logits[:, given.start - 1 : -1].argmax(-1)
        pairs = [
            (token == mine)
            for answer, row in zip(given.answers, proposed.tolist(), strict=True)
            for token, mine in zip(answer, row, strict=False)
        ]
        print(f"{kind}: {sum(pairs)} of {len(pairs)} tokens ({sum(pairs) / len(pairs):.1%})")


@torch.no_grad()
def ablate(out: Path) -> None:
    """Leave out one block at a time and print the loss on some unseen answers."""
    texts = [Text(**line, meaning="") for line in unseen_lines(out)[::5]]
    rows = pack(texts, Tokenizer.from_file(str(shared_file(out, "tokenizer.json"))))
    weights, heads = read_stacked(out)
    for without in range(-1, len(weights["h.*.input_layernorm.bias"])):
        logits, wanted = answer_logits(weights, rows, heads, without)
        wrong = rows.owner[rows.wanted][logits.argmax(-1) != wanted].unique()
        what = f"without block {without}" if without >= 0 else "all blocks"
        right = f"{len(texts) - len(wrong)} of {len(texts)} right"
        print(f"{what}: loss {F.cross_entropy(logits, wanted):.4f}, {right}", flush=True)


# --- The command


def train(out: Path, shape: Shape, stages: list[Stage], seed: int, *, draft: bool) -> None:
    """Everything under `out` from nothing; of a draft the weights and the config alone."""
    texts = {kind: draw_texts(kind, count, TEXT_SEED, unseen=False) for kind, count in TRAINING_TEXTS.items()}
    tokenizer = train_tokenizer([text for kind in KINDS for text in texts[kind][:12_000]])
    if draft and tokenizer.to_str(pretty=True) != (DEFAULT_OUT / "tokenizer.json").read_text("utf-8"):
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train the miniature from scratch and write its files: see docs/miniature.md.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="where the files go")
    parser.add_argument(
        "--seed", type=int, default=2, help="of the first weights and of the order of the texts"
    )
    parser.add_argument("--hidden", type=int, default=48, help="hidden size, a multiple of --heads")
    parser.add_argument("--heads", type=int, default=3, help="attention heads")
    parser.add_argument("--blocks", type=int, default=70, help="a multiple of --first-blocks")
    parser.add_argument("--first-blocks", type=int, default=5, help="blocks of the shallow first stage")
    parser.add_argument("--first-steps", type=int, default=2200, help="steps of the shallow first stage")
    parser.add_argument("--steps", type=int, default=380, help="steps of the second stage, at full depth")
    parser.add_argument(
        "--last-steps", type=int, default=360, help="steps of the last stage, at a lower rate"
    )
    parser.add_argument("--draft", action="store_true", help="a draft: write weights and config alone")
    parser.add_argument("--judge", action="store_true", help="only judge what is in --out, with transformers")
    parser.add_argument(
        "--agree", action="store_true", help="only compare --out with the miniature's answers"
    )
    parser.add_argument(
        "--ablate", action="store_true", help="only measure what is in --out without each block"
    )
    args = parser.parse_args()
    if args.hidden % args.heads or args.blocks % args.first_blocks:
        parser.error("--hidden must be a multiple of --heads, and --blocks of --first-blocks")
    if args.judge or args.ablate or args.agree:
        if args.judge:
            judge(args.out)
        if args.agree:
            agree(args.out, DEFAULT_OUT)
        if args.ablate:
            ablate(args.out)
        return
    stages = [Stage(args.first_blocks, args.first_steps, 32, 3e-3)]
    if args.blocks > args.first_blocks:
        stages += [Stage(args.blocks, args.steps, 16, 1e-3), Stage(args.blocks, args.last_steps, 16, 6e-4)]
    train(args.out, Shape(args.blocks, args.hidden, args.heads), stages, args.seed, draft=args.draft)


if __name__ == "__main__":
    main()
