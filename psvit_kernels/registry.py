"""Providers of the operations, and which one serves a call.

A provider is a module with one function per operation, ``missing()``, which gives None or the
reason why this machine has none of it, and one predicate, ``supports(op, args)``, which gives None
or the reason why it can't serve a call. Automatic choice and the error shown to
a person who forces a provider both come from that predicate.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from types import ModuleType

import torch

from . import cpu, cuda, reference
from .triton import provider as triton

PROVIDERS: dict[str, ModuleType] = {
    "triton": triton,
    "cuda": cuda,
    "cpu": cpu,
    "reference": reference,
}

#: Who is asked for tensors of a device, best first; the reference, which serves everything, always.
#: The CUDA C++ kernels are not among them until they have been measured: they must be forced.
PREFERENCE: dict[str, tuple[str, ...]] = {"cuda": ("triton",), "cpu": ("cpu",)}

#: How often a better provider had to pass a call on, and why: shown by ``psvit info``.
fallbacks: Counter[str] = Counter()

_forced: str | None = None


def _known(name: str | None, origin: str) -> str | None:
    if name is not None and name not in PROVIDERS:
        choices = ", ".join(PROVIDERS)
        raise ValueError(f'{origin}: got "{name}", expected one of {choices}, or auto')
    return name


def _from_environment() -> str | None:
    name = os.environ.get("PSVIT_PROVIDER", "auto")
    return _known(None if name == "auto" else name, "PSVIT_PROVIDER")


class use:
    """Forces a provider for every later call, or inside a ``with`` block; "auto" lifts it.

    A forced provider never falls back silently: a call that it can't serve raises.

    Args:
        provider: "triton", "cuda", "cpu", "reference" or "auto".

    Raises:
        ValueError: no such provider.
    """

    def __init__(self, provider: str) -> None:
        global _forced
        name = _known(None if provider == "auto" else provider, "provider")
        self._before = _forced
        _forced = name

    def __enter__(self) -> use:
        return self

    def __exit__(self, *exc: object) -> None:
        global _forced
        _forced = self._before


def providers() -> dict[str, str | None]:
    """Every provider by name, best first: None, or why it can't be used on this machine."""
    return {name: provider.missing() for name, provider in PROVIDERS.items()}


def forced() -> str | None:
    """The provider that ``use`` or PSVIT_PROVIDER forces, or None."""
    return _forced


def choose(op: str, args: tuple) -> ModuleType:
    """The provider that serves this call of a registered operation."""
    if _forced is not None:
        reason = PROVIDERS[_forced].supports(op, args)
        if reason is not None:
            raise ValueError(f'provider "{_forced}" was forced but cannot serve {op}: {reason}')
        return PROVIDERS[_forced]
    for name in PREFERENCE.get(args[0].device.type, ()):
        reason = PROVIDERS[name].supports(op, args)
        if reason is None:
            return PROVIDERS[name]
        fallbacks[f"{op}: not {name}: {reason}"] += 1
    return reference


def call(op: str, *args):
    """The result of the provider that serves this call."""
    return getattr(choose(op, args), op)(*args)


_forced = _from_environment()

_library = torch.library.Library("psvit_kernels", "DEF")


def register(schema: str, fake, backward=None, setup_context=None, run=None) -> None:
    """Defines an operation once: schema, shapes for tracing, derivative; providers implement it.

    ``run`` stands for the call of the provider where there is something to do around it.
    """
    op = schema.split("(", 1)[0]
    run = partial(call, op) if run is None else run

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(op, run, "CompositeExplicitAutograd")
    name = f"psvit_kernels::{op}"
    torch.library.register_fake(name, fake, lib=_library)
    if backward is None:
        # Without this, a second derivative would be silently wrong.
        backward = _not_differentiable(op.removesuffix("_backward"))
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_library)


def _not_differentiable(op: str):
    def backward(ctx, *grads):
        raise NotImplementedError(f"{op}: second derivatives are not implemented")

    return backward
