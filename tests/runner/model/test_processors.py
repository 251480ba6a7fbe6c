"""The oracle's tests as other processors would run them: torch does without some of this one's instructions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.kernel.library import ENVIRONMENT, usable_variants

ROOT = Path(__file__).resolve().parents[3]
# What a processor is told not to use: the sums of torch are then those of another kind of processor, and the kernel is
# the one for that.
PROCESSORS = {
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "AVX-512 without bf16 products": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
    },
    "neither": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
KERNELS = {"AVX2": "avx2", "AVX-512 without bf16 products": "avx512", "neither": "sse2"}


def environment_of(processor: str) -> dict[str, str]:
    environment = {**os.environ, **PROCESSORS[processor]}
    if KERNELS[processor] in usable_variants():
        environment[ENVIRONMENT] = KERNELS[processor]
    return environment


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
            command, capture_output=True, text=True, env=environment_of(processor), cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1 and len(found.pop().split()) == 3 * 11


@pytest.mark.slow
@pytest.mark.parametrize("processor", PROCESSORS)
def test_logits_are_those_of_transformers_on_another_processor(processor: str) -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "test_oracle.py"]
    environment, folder = environment_of(processor), Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
