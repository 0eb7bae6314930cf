"""Learned pools of trained models: blends of a token and its cell's average, chosen by outputs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import answer, ignore_schedule_warning, images, timm_vit
from surroundings import silent
from torch import Tensor, nn

import psvit
from psvit.calibrate import Report, calibrate
from psvit.calibrate.pools import AVERAGES, Blend, tries
from psvit.stack import find_stack

pytestmark = [pytest.mark.usefixtures("one_thread"), ignore_schedule_warning]


def fitted(model: nn.Module, schedule: str, x: Any, **options: Any) -> tuple[nn.Module, Report]:
    return calibrate(model, schedule, x, progress=silent, **options)


@pytest.mark.parametrize("token", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_blend_is_a_token_and_the_average_of_its_cell(token: tuple[int, int]) -> None:
    grid = torch.randn(2, 5, 8, 6)
    taps = Blend(token, 0.3).taps().expand(5, 1, 3, 3)
    got = F.conv2d(grid, taps, stride=2, padding=1, groups=5)
    chosen = grid[:, :, token[0] :: 2, token[1] :: 2]
    torch.testing.assert_close(got, 0.7 * chosen + 0.3 * F.avg_pool2d(grid, 2))


@pytest.mark.parametrize("token", [0, 1])
def test_a_blend_of_a_sequence_has_cells_of_two(token: int) -> None:
    row = torch.randn(2, 5, 8)
    taps = Blend((token,), 0.3).taps().expand(5, 1, 3)
    got = F.conv1d(row, taps, stride=2, padding=1, groups=5)
    torch.testing.assert_close(got, 0.7 * row[:, :, token::2] + 0.3 * F.avg_pool1d(row, 2))


def output_error(model: nn.Module, schedule: str, x: Tensor, taps: Tensor) -> float:
    """Relative squared one of the class scores, with the given taps, every layer attending."""
    converted = psvit.accelerate(model, schedule, pool="conv", size_bias=True)
    with torch.no_grad():
        find_stack(converted).pool(0).weight.copy_(taps)
    want, got = (answer(m, x).detach() for m in (model, converted))
    return float((got - want).square().sum() / want.square().sum())


def test_the_blend_with_the_nearest_outputs_is_chosen() -> None:
    model, x = timm_vit(), images(40, 3, 32, 32)
    fast, report = fitted(model, "AA|AS", x, batch=16)
    (pool,) = report.pools
    assert pool.layer == 2

    def tried(token: tuple[int, ...], average: float) -> float:
        return output_error(model, "AA|AA", x, pool.scale * Blend(token, average).taps())

    taps = find_stack(fast).pool(0).weight
    want = pool.scale * Blend(pool.token, pool.average).taps()
    torch.testing.assert_close(taps, want.expand_as(taps))
    best = tried(pool.token, pool.average)
    assert pool.error == pytest.approx(best, rel=1e-3)
    others = [(pool.token, average) for average in AVERAGES]
    if pool.average == AVERAGES[0]:
        others += [(token, AVERAGES[0]) for token in itertools.product((0, 1), (0, 1))]
    losses = {other: tried(*other) for other in others}
    # Each blend has a scale of its own, a little different.
    assert best <= min(losses.values()) * 1.02, (best, losses)
    assert max(losses.values()) > best * 1.02, losses


def test_pooled_tokens_have_the_root_mean_square_of_the_others() -> None:
    model, x = timm_vit(), images(20, 3, 32, 32)
    fast, _ = fitted(model, "AA|AA", x)
    seen: list[Tensor] = []
    stack = find_stack(fast)
    stack.block(1).register_forward_hook(lambda block, args, out: seen.append(out))
    stack.block(2).register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    answer(fast, x)
    before, after = (t[:, 1:].square().mean().item() for t in seen)
    assert seen[1].shape[1] == 17 and after == pytest.approx(before, rel=1e-3), (before, after)


@pytest.mark.parametrize("dims", [1, 2])
def test_each_of_several_pools_is_chosen_with_those_before_it_in_place(dims: Any) -> None:
    model, x = timm_vit(), images(30, 3, 32, 32)
    counted: list[float] = []

    def progress(title: str, total: float) -> Any:
        counted.append(total)
        return silent(title, total)

    fast, report = calibrate(model, "A|A|AS", x, dims=dims, progress=progress)
    assert [pool.layer for pool in report.pools] == [1, 2]
    assert all(len(pool.token) == dims for pool in report.pools)
    one, _ = calibrate(model, "A|AAA", x, dims=dims, progress=silent)
    first = [find_stack(m).pool(0).weight for m in (fast, one)]
    assert torch.equal(*first), "the first pool depends on what comes after it"
    fits = len(report.fits)
    assert counted == [fits * 30 + 2 * tries(dims) * 30]


def test_in_an_odd_grid_no_token_of_the_padding_is_chosen() -> None:
    model = timm_vit(img_size=28)  # 7 x 7 patches
    _, report = fitted(model, "AA|AA", images(30, 3, 28, 28))
    assert report.pools[0].token == (0, 0)


def test_a_model_without_classes_is_judged_by_its_features() -> None:
    model, x = timm_vit(num_classes=0), images(30, 3, 32, 32)
    fast, report = fitted(model, "AA|AA", x)
    error = output_error(model, "AA|AA", x, find_stack(fast).pool(0).weight)
    assert report.pools[0].error == pytest.approx(error, rel=1e-3)


def test_blocks_run_again_afterwards_and_other_pools_are_left_alone() -> None:
    model, x = timm_vit(), images(30, 3, 32, 32)
    fast, report = fitted(model, "AA|AA", x, pool="avg")
    assert report.pools == []
    fast, _ = fitted(model, "AA|AA", x)
    for stack in (find_stack(fast), find_stack(psvit.accelerate(model, "AA|AA"))):
        assert all("forward" not in vars(stack.block(i)) for i in range(4))


def test_the_table_tells_the_pool() -> None:
    _, report = fitted(timm_vit(), "AA|AA", images(30, 3, 32, 32))
    pool = report.pools[0]
    caption = report.table().caption
    share = f"{1 - pool.average:.0%} of token {pool.token}"
    assert f"pool before layer 3: {share}" in caption and f"times {pool.scale:.3f}" in caption
    assert report.to_dict()["pools"][0]["scale"] == pool.scale
