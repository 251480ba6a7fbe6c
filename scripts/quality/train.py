"""Train a BLOOM of some ten million parameters on manual pages in several languages, to measure quality on.

    apt-get download manpages manpages-dev manpages-de manpages-fr manpages-es manpages-pl manpages-ru manpages-pt-br
    python -m scripts.quality.train PACKAGES OUT [--minutes 120] [--threads 2]

PACKAGES holds the .deb files. OUT gets `source`, a checkpoint in bfloat16 with its own tokenizer, and `held_out.txt`,
pages that training never saw. Its rows are whole super-groups of the form int4, and its vocabulary is small, so that
most of its weights are in the blocks, as in large models. Training ends when the time is over, whatever was reached
by then: the learning rate falls with the clock, which is the processor's, so other programs cost no quality.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import re
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import BloomConfig, BloomForCausalLM

from scripts.fakehub.checkpoint import pre_tokenizer

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
# Small steps: few tokens are seen, so many steps matter more than quiet gradients.
LENGTH, ROWS = 128, 4
HELD_OUT = 50  # one page in so many
RATE, WARM_UP = 1.5e-3, 0.02


def pages(package: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each manual page in a .deb file, without the commands of its markup."""
    data = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            if member.isfile() and re.search(r"/man\d\w*/.*\.gz$", member.name):
                text = gzip.decompress(archive.extractfile(member).read()).decode("utf-8", "replace")
                yield member.name, plain_text(text)


def plain_text(page: str) -> str:
    """The words of a page of roff."""
    lines = []
    for line in page.splitlines():
        if line.startswith(('.\\"', "'\\\"")):
            continue
        line = re.sub(r"^[.'][A-Za-z]+ ?", "", line)
        line = re.sub(r"\\f[A-Z]|\\f\[[^]]*\]|\\s[-+]?\d|\\[&/,|:%]", "", line)
        line = line.replace("\\-", "-").replace("\\(aq", "'").replace("\\e", "\\").replace("\\ ", " ")
        if line.strip(" .\"'"):
            lines.append(line)
    return "\n".join(lines)


def train_tokenizer(texts: list[str], entries: int) -> Tokenizer:
    """Byte-level BPE in BLOOM's layout."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=entries, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def learning_rate(share: float) -> float:
    """The rate when that share of the time is over: a short rise, then a straight fall to nothing."""
    return RATE * min(share / WARM_UP, (1 - share) / (1 - WARM_UP))


def train(model: BloomForCausalLM, ids: torch.Tensor, seconds: float, seed: int) -> int:
    """Train on rows of `ids` drawn at random; the number of tokens that were seen."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    generator, began, step = torch.Generator().manual_seed(seed), time.process_time(), 0
    while (share := (time.process_time() - began) / (seconds * torch.get_num_threads())) < 1:
        optimizer.param_groups[0]["lr"] = learning_rate(share)
        starts = torch.randint(len(ids) - LENGTH - 1, (ROWS,), generator=generator)
        rows = torch.stack([ids[start : start + LENGTH + 1] for start in starts.tolist()])
        logits = model(rows[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 100 == 0:
            print(f"{share:.0%}, step {step}: loss {loss:.3f}", flush=True)
    return step * ROWS * LENGTH


def save(out: Path, model: BloomForCausalLM, tokenizer: Tokenizer) -> None:
    """The checkpoint, its config in the form of today's transformers."""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    (out / "special_tokens_map.json").write_text(json.dumps(names))
    (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BloomTokenizerFast", **names}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small BLOOM on manual pages.")
    parser.add_argument("packages", type=Path, help="a directory of .deb files")
    parser.add_argument("out", type=Path)
    defaults = {"minutes": 120, "threads": 2, "hidden": 256, "blocks": 12, "entries": 4096, "seed": 1}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    texts = sorted(page for package in sorted(given.packages.glob("*.deb")) for page in pages(package))
    random.Random(given.seed).shuffle(texts)
    held_out, seen = texts[::HELD_OUT], [each for i, each in enumerate(texts) if i % HELD_OUT]
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "held_out.txt").write_text("\n\n".join(text for _, text in held_out), "utf-8")
    tokenizer = train_tokenizer([text for _, text in seen[:4000]], given.entries)
    ids = torch.tensor([token for _, text in seen for token in tokenizer.encode(text).ids])
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    config = BloomConfig(
        vocab_size=given.entries, hidden_size=given.hidden, n_layer=given.blocks, n_head=given.hidden // 32
    )
    model = BloomForCausalLM(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count:,} parameters, {len(seen):,} pages of {len(ids):,} tokens", flush=True)
    tokens = train(model, ids, 60 * given.minutes, given.seed)
    print(f"{tokens:,} tokens seen", flush=True)
    save(given.out / "source", model, tokenizer)


if __name__ == "__main__":
    main()
