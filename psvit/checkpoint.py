"""Checkpoints: written whole or not at all, read or refused with the reason."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from .files import whole_file

#: What goes on from a checkpoint.
Kind = Literal["training run", "search", "distillation"]

#: Of the file's contents; a file of another form is refused.
FORM = 4
NAME = "last.pt"


def save(folder: Path, kind: Kind, state: Mapping[str, Any]) -> None:
    """Writes ``last.pt``. Until the last byte is on the disk, the older file stays as it was.

    Raises:
        OSError: a full disk, a folder that can't be written.
    """
    with whole_file(folder / NAME) as work:
        try:
            with open(work, "wb") as stream:
                torch.save({"form": FORM, "kind": kind, **state}, stream)
                stream.flush()
                os.fsync(stream.fileno())
        except RuntimeError as error:
            cause = error.__context__  # PyTorch puts its own error over that of the disk
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(folder / NAME)) from error
            raise


def load(folder: Path, kind: Kind) -> dict[str, Any]:
    """What ``save`` wrote.

    Raises:
        ValueError: no checkpoint there, or one that is truncated, not of this program or of
            another kind.
    """
    path = folder / NAME
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint to go on from")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise anything
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a whole checkpoint: {said}") from error
    if not isinstance(state, dict) or state.get("form") != FORM:
        raise ValueError(f"{path}: not a checkpoint of psvit, or one of another version")
    if state["kind"] != kind:
        raise ValueError(
            f"output: {folder} holds a checkpoint of a {state['kind']}, expected one of a {kind}"
        )
    return state


def stopped(folder: Path, kind: Kind, *, resume: bool) -> dict[str, Any] | None:
    """The checkpoint to go on from, if that is wanted; else there must be none to overwrite.

    Raises:
        ValueError: as ``load``; without ``resume`` a folder that has a checkpoint.
    """
    if resume:
        return load(folder, kind)
    if (folder / NAME).exists():
        raise ValueError(
            f"output: {folder} holds a checkpoint already; resume it, or name another folder"
        )
    return None


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings of the work that stopped that are others now, each in words."""
    return [
        f"{name} was {was.get(name)}, is {now.get(name)}"
        for name in dict.fromkeys((*now, *was))
        if was.get(name) != now.get(name)
    ]
