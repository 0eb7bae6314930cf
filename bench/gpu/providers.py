"""Who serves a row: one provider, forced, and of the CUDA kernels one family."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from psvit_kernels import cuda, use

#: Environment variable that picks a family.
FAMILY = "PSVIT_CUDA_KERNELS"


@contextmanager
def serving(provider: str) -> Iterator[None]:
    """Forces "triton", "cuda", or with a family "cuda/sm_80": nothing falls back."""
    name, _, family = provider.partition("/")
    with use(name), patch.dict(os.environ, {FAMILY: family} if family else {}):
        cuda.family.cache_clear()  # it has read another one
        try:
            yield
        finally:
            cuda.family.cache_clear()


def is_refusal(error: BaseException) -> bool:
    """Whether a provider said that it can't serve a call, or a GPU that it hasn't the family."""
    return isinstance(error, ValueError) and str(error).startswith(('provider "', FAMILY))
