"""The oracle's tests as other processors would run them: torch does without some of this one's instructions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.kernel.library import ENVIRONMENT, usable_variants

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


@pytest.mark.slow
@pytest.mark.parametrize("processor", PROCESSORS)
def test_logits_are_those_of_transformers_on_another_processor(processor: str) -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "test_oracle.py"]
    environment = {**os.environ, **PROCESSORS[processor]}
    if KERNELS[processor] in usable_variants():
        environment[ENVIRONMENT] = KERNELS[processor]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
