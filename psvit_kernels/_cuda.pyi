"""The compiled module of the CUDA kernels; see csrc/cuda/module.cpp."""

from typing import Any

emulated: bool
architectures: str
families: dict[str, list[str]]
short_tokens: int
max_dim: int

def apply(*args: Any) -> None: ...
def apply_shared(family: str, tokens: int, dim: int, code: str) -> int: ...
def attention(*args: Any) -> None: ...
def token_pool(*args: Any) -> None: ...
