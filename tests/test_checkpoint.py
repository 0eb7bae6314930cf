"""Checkpoints: each kind of work goes on from its own, and overwrites none."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import get_args

import hosts
import pytest
import torch
from surroundings import silent

import psvit
from psvit import checkpoint, cli
from psvit.distill import distill
from psvit.planning.plan import Plan

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("yaml")

KINDS = get_args(checkpoint.Kind)


@pytest.fixture
def refused(tmp_path, capsys):
    """Starts work of a kind in ``tmp_path``, or goes on with it; returns why that can't be."""

    def refused(kind: str, *, resume: bool) -> str:
        if kind == "distillation":
            return distillation(tmp_path, resume=resume)
        command = {"training run": ["train", "--data", "digits"], "search": ["search"]}[kind]
        flags = ["--resume"] if resume else []
        assert cli.main([*command, "--output", str(tmp_path), *flags]) == 2
        return " ".join(capsys.readouterr().err.split())

    return refused


def distillation(folder: Path, *, resume: bool) -> str:
    model = hosts.timm_vit()
    options = {"schedule": psvit.Schedule("AAAA"), "pool": "avg", "dims": 2, "size_bias": True}
    plan = Plan.of(model, psvit.accelerate(model, "AAAA"), **options)
    options = {"output": folder, "resume": resume, "progress": silent}
    with pytest.raises(ValueError) as error:
        distill(model, plan, torch.randn(4, 3, 32, 32), **options)
    return str(error.value)


@pytest.mark.parametrize(("kind", "other"), list(itertools.permutations(KINDS, 2)))
def test_work_does_not_go_on_from_another_kind_of_checkpoint(kind, other, tmp_path, refused):
    checkpoint.save(tmp_path, other, {})
    message = f"output: {tmp_path} holds a checkpoint of a {other}, expected one of a {kind}"
    assert refused(kind, resume=True).endswith(message)


@pytest.mark.parametrize(("kind", "other"), list(itertools.product(KINDS, repeat=2)))
def test_no_work_overwrites_a_checkpoint(kind, other, tmp_path, refused):
    checkpoint.save(tmp_path, other, {})
    before = (tmp_path / "last.pt").read_bytes()
    message = f"output: {tmp_path} holds a checkpoint already; resume it, or"
    assert message in refused(kind, resume=False)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_differences_name_what_was_and_what_is():
    was, now = {"lr": 0.1, "seed": 0, "tune": "all"}, {"lr": 0.1, "seed": 1, "steps": 5}
    found = checkpoint.differences(was, now)
    assert found == ["seed was 0, is 1", "steps was None, is 5", "tune was all, is None"]
