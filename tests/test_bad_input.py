"""Every bad input of ``psvit_kernels`` ends in one error, with this message and nothing run."""

from __future__ import annotations

import math
import re

import pytest
import torch
from bad_attention import APPLY, ATTENTION
from bad_maps import MAPS
from bad_pool import POOL
from inputs import BF16, F64
from right_calls import apply, attend, conv, factored, pool, t

import psvit_kernels as pk
from psvit_kernels import registry

PROVIDERS = [
    (
        lambda: pk.use("tpu"),
        ValueError,
        f'provider: got "tpu", expected one of {", ".join(registry.PROVIDERS)}, or auto',
    ),
    (
        lambda: pk.use("CPU"),
        ValueError,
        f'provider: got "CPU", expected one of {", ".join(registry.PROVIDERS)}, or auto',
    ),
]

TABLE = [*ATTENTION, *APPLY, *MAPS, *POOL, *PROVIDERS]


@pytest.mark.parametrize(("call", "error", "message"), TABLE, ids=[row[2] for row in TABLE])
def test_bad_input_raises(call, error, message, monkeypatch):
    def nothing_may_run(op, args):
        raise AssertionError(f"{op} ran")

    monkeypatch.setattr(registry, "choose", nothing_may_run)
    with pytest.raises(error, match=f"^{re.escape(message)}$") as caught:
        call()
    assert type(caught.value) is error


def test_right_input_of_the_same_helpers_runs():
    """The table's calls are wrong only in what they change."""
    attend()
    apply()
    apply(factored(), t(2, 3, 7, 16))
    pool()
    conv()


def test_autocast_casts_before_dtypes_are_compared():
    with torch.autocast("cpu", dtype=BF16):
        out, _ = attend(k=t(2, 3, 5, 16, dtype=BF16), bias=t(5, dtype=F64))
    assert out.dtype == BF16


def test_shapes_can_be_asked_for_without_values():
    """On the meta device, as when a model is built before its weights are loaded."""
    q = t(2, 3, 5, 16, device="meta")
    for form in ("dense", "factored"):
        out, m = pk.attention(q, q, q, return_map=form)
        assert out.shape == pk.apply_attention(m, q).shape == (2, 3, 5, 16)
        assert out.device.type == "meta" and m.shape == (2, 3, 5, 5)
    assert pk.token_pool(t(2, 20, 6, device="meta"), (4, 5))[0].shape == (2, 6, 6)


def test_nan_is_no_error(provider):
    out, _ = attend(q=t(2, 3, 5, 16) * math.nan)
    assert bool(out.isnan().all())
    assert bool(apply(v=t(2, 3, 5, 16) * math.nan).isnan().all())
    assert bool(pool(t(2, 20, 6) * math.nan)[0].isnan().all())
