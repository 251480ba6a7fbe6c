"""What forms of one model lose: perplexity, KL divergence and the likeliest token, beside the plain one.

    python -m scripts.quality.measure PLAIN TEXT [--forms DIR ...] [--gguf Q8_0 Q4_0 Q4_K_M] [--tokens 20000]

PLAIN and each DIR are prepared directories of one model; TEXT is what none was trained on. It is cut into windows of
128 tokens, of which all but the first are scored, each after those before it in its window. A TEXT.jsonl has lines of
a "prompt" and its "answer": the tokens of each answer are scored, after its prompt. With --gguf llama.cpp's
own quantizer makes files of those kinds from the same weights, beside one in bfloat16, and llama.cpp runs them; they
are compared with its own bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import runner

WINDOW = 128
# Logits of a window [T, V] in float32.
Logits = Callable[[Sequence[int]], torch.Tensor]


@dataclass
class Loss:
    """Sums over tokens: of their negative log-probabilities, of KL divergences, of equal likeliest tokens."""

    tokens: int = 0
    negative: float = 0.0
    divergence: float = 0.0
    equal: int = 0

    def add(self, reference: torch.Tensor, found: torch.Tensor, wanted: torch.Tensor) -> None:
        """Count the logits [T, V] of one window, of which `wanted` [T] are the right tokens."""
        ours, theirs = (each.double().log_softmax(-1) for each in (found, reference))
        self.tokens += len(wanted)
        self.negative -= float(ours.gather(1, wanted[:, None]).sum())
        self.divergence += float((theirs.exp() * (theirs - ours)).sum())
        self.equal += int((ours.argmax(-1) == theirs.argmax(-1)).sum())

    def row(self, name: str, bits: float, perplexity: float) -> str:
        """A line of the table; `perplexity` is that of the reference."""
        own = math.exp(self.negative / self.tokens)
        change = f"{100 * (own / perplexity - 1):+.3f}%"
        kl, top = self.divergence / self.tokens, 100 * self.equal / self.tokens
        return f"| {name} | {bits:.2f} | {own:.4f} | {change} | {kl:.6f} | {top:.2f}% |"


def ours(directory: Path) -> Logits:
    """The runner's logits."""
    model = runner.load(directory)

    def logits(ids: Sequence[int]) -> torch.Tensor:
        return model.forward(list(ids), model.cache(len(ids)), all_rows=True).float()

    return logits


def llama(path: Path) -> Logits:
    """llama.cpp's logits."""
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(str(path), n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, verbose=False)

    def logits(ids: Sequence[int]) -> torch.Tensor:
        model.reset()
        model.eval(list(ids))
        return torch.from_numpy(np.array(model.scores[: len(ids)]))

    return logits


@dataclass(frozen=True)
class Window:
    """Token ids, of which those from position `first` on are scored."""

    ids: list[int]
    first: int = 1


def windows(directory: Path, text: Path, tokens: int) -> list[Window]:
    """Whole windows of a text's first tokens, or one for each line of a .jsonl."""
    encode = runner.load(directory).tokenizer.encode
    if text.suffix == ".jsonl":
        lines = map(json.loads, text.read_text("utf-8").splitlines())
        return [
            Window([*encode(line["prompt"] + line["answer"])], len(encode(line["prompt"]))) for line in lines
        ]
    ids = encode(text.read_text("utf-8"))[:tokens]
    return [Window([*ids[at : at + WINDOW]]) for at in range(0, len(ids) - WINDOW + 1, WINDOW)]


def compared(names: Sequence[str], models: Sequence[Logits], texts: list[Window]) -> Iterator[Loss]:
    """The losses of all models against the first."""
    losses = [Loss() for _ in names]
    for text in texts:
        found = [model(text.ids)[text.first - 1 : -1] for model in models]
        for loss, each in zip(losses, found, strict=True):
            loss.add(found[0], each, torch.tensor(text.ids[text.first :]))
    yield from losses


def bits(path: Path, parameters: int) -> float:
    """Bits a weight of a GGUF file, or of the parts of a prepared directory."""
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    return 8 * sum(file.stat().st_size for file in files) / parameters


def report(
    names: Sequence[str], paths: Sequence[Path], models: Sequence[Logits], given: argparse.Namespace
) -> None:
    """Print the table of some models, the first of which is the reference."""
    from toolkit.commands.info import inspect

    parameters = inspect(given.plain).parameters
    losses = list(compared(names, models, windows(given.plain, given.text, given.tokens)))
    perplexity = math.exp(losses[0].negative / losses[0].tokens)
    print(f"{losses[0].tokens:,} tokens\n\n| | bits | perplexity | change | KL | same likeliest |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, path, loss in zip(names, paths, losses, strict=True):
        print(loss.row(name, bits(path, parameters), perplexity), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what forms of a model lose.")
    parser.add_argument("plain", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--forms", type=Path, nargs="*", default=[])
    parser.add_argument("--gguf", nargs="*", default=[], metavar="KIND")
    parser.add_argument("--tokens", type=int, default=20_000)
    given = parser.parse_args()
    paths = [given.plain, *given.forms]
    report([path.name for path in paths], paths, [ours(path) for path in paths], given)
    if given.gguf:
        from scripts.bench.peers.gguf_bloom import quantise, write_gguf

        with tempfile.TemporaryDirectory() as work:
            plain = Path(work, "BF16.gguf")
            write_gguf(given.plain, plain)
            paths = [plain]
            for kind in given.gguf:
                paths.append(plain.with_name(f"{kind}.gguf"))
                quantise(plain, paths[-1], kind)
            report([path.stem for path in paths], paths, [llama(path) for path in paths], given)


if __name__ == "__main__":
    main()
