"""The oracle's tests as other processors would run them: torch does without some of this one's instructions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.kernel.library import ENVIRONMENT, usable_variants

ROOT = Path(__file__).resolve().parents[3]
# What a processor is told to use: the sums of torch are then those of another kind of processor, and the kernel is the
# one for that. Torch believes what it is told, so a processor that lacks instructions would stop at the first of them.
PROCESSORS = {
    kernel: {"ATEN_CPU_CAPABILITY": torchs, "ONEDNN_MAX_CPU_ISA": onednns, ENVIRONMENT: kernel}
    for kernel, torchs, onednns in (
        ("sse2", "default", "SSE41"),
        ("avx2", "avx2", "AVX2"),
        ("avx512", "avx512", "AVX512_CORE"),  # without bf16 products
        ("neon", "default", "DEFAULT"),
    )
    if kernel in usable_variants()
}
# With AVX2 alone the oracle's tests are run as they are.
OTHERS = [name for name in PROCESSORS if (name, usable_variants()[-1]) != ("avx2", "avx2")]


# Prints the logits of a prompt and of some cached steps as a hash.
LOGITS = """
import hashlib, sys, runner
for directory in sys.argv[1:]:
    model = runner.load(directory)
    cache, ids = model.cache(60), [7 * place % 1200 for place in range(1, 42)]
    logits = [model.forward(ids, cache, all_rows=True), *(model.forward([token], cache) for token in ids[:10])]
    print(*(hashlib.sha256(each.float().numpy().tobytes()).hexdigest() for each in logits))
"""


@pytest.mark.slow
def test_every_processor_gives_the_same_bits(prepared) -> None:
    """Not only the kernel's variants: nothing that torch does in another way there reaches a logit."""
    directories = [prepared(dtype=dtype)[1] for dtype in ("bfloat16", "float16", "float32")]
    command, found = [sys.executable, "-c", LOGITS, *map(str, directories)], set()
    for processor in PROCESSORS:
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **PROCESSORS[processor]}, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1 and len(found.pop().split()) == 3 * 11


@pytest.mark.slow
@pytest.mark.parametrize("processor", OTHERS)
def test_logits_are_those_of_transformers_on_another_processor(processor: str) -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "test_oracle.py"]
    command += ["-k", "not miniature"]
    environment, folder = {**os.environ, **PROCESSORS[processor]}, Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
