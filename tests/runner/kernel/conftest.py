"""The kernel's tests run with every variant that this processor can run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from runner.kernel.library import ENVIRONMENT, load_kernel, usable_variants


@pytest.fixture(autouse=True, scope="module", params=usable_variants())
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT, request.param)
        load_kernel.cache_clear()
        yield request.param
    load_kernel.cache_clear()
