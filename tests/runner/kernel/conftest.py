"""The kernel's tests run with every variant that this processor can run, or with a remote kernel."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator

import pytest

from runner.kernel import library
from runner.kernel.library import ENVIRONMENT, load_kernel, usable_variants
from tests.runner.kernel import remote

REMOTE = os.environ.get(remote.ENVIRONMENT)


@pytest.fixture(autouse=True, scope="module", params=["remote"] if REMOTE else usable_variants())
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        if REMOTE:
            kernel = remote.RemoteKernel(shlex.split(REMOTE), near=load_kernel())
            patch.setattr(library, "open_library", lambda variant: kernel)
            request.addfinalizer(kernel.close)
        else:
            patch.setenv(ENVIRONMENT, request.param)
        load_kernel.cache_clear()
        yield request.param
    load_kernel.cache_clear()
