"""Closed-form calibration of converted models: small random ones of every host."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hosts import DEPTH, EVERY, HUB, TORCHVISION, answer, images, timm_vit
from rich.console import Console
from torch import Tensor, nn

import psvit
from psvit.calibrate import RankDeficientWarning, Report, calibrate, correction
from psvit.calibrate.correction import MLPFit, OutputFit, ValueFit
from psvit.calibrate.lockstep import Lockstep
from psvit.calibrate.ridge import LeastSquares
from psvit.stack import find_stack

pytestmark = pytest.mark.usefixtures("one_thread")

Make = Callable[[], nn.Module]


def fitted(model: nn.Module, schedule: str, x: Any, **options: Any) -> tuple[nn.Module, Report]:
    options = {"progress": lambda title, total: nullcontext(lambda count: None)} | options
    return calibrate(model, schedule, x, **options)


def lockstep(model: nn.Module, schedule: str) -> Lockstep:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = psvit.accelerate(model, schedule, pool="stride", size_bias=True)
        return Lockstep(psvit.accelerate(model, "A" * DEPTH), fast)


@pytest.mark.parametrize("make", EVERY)
def test_every_fit_brings_the_tokens_nearer_to_the_original(make: Make) -> None:
    model, x = make(), images(20, 3, 32, 32)
    _, report = fitted(model, "ASA|A", x)
    assert [fit.layer for fit in report.fits] == [1, 1, 3]
    assert not report.left_alone
    for fit in report.fits:
        assert fit.after < fit.before, fit
        assert fit.kept == (fit.held_out_after < fit.held_out_before), fit
    assert (report.images, report.held_out) == (18, 2)


def test_errors_are_those_of_the_models_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = timm_vit(), images(20, 3, 32, 32)
    # The model stays as the errors are told of, not fitted to the images held out.
    monkeypatch.setattr(LeastSquares, "join", lambda *problems: None)
    fast, report = fitted(model, "AASS", x, prefix_weight=3.0)
    held = torch.arange(20) % 10 == 9
    steps = Lockstep(psvit.accelerate(model, "AAAA"), fast)
    for fit, name in ((report.fits[-2], "middle"), (report.fits[-1], "after")):
        assert fit.layer == 3
        if not fit.kept:
            continue
        for chosen, error in ((~held, fit.after), (held, fit.held_out_after)):
            seen = steps.run(x[chosen], 3)
            got, goal = getattr(seen, name), getattr(seen, f"{name}_target")
            weights = torch.ones(got.shape[1])
            weights[0] = 3
            ratio = ((got - goal) ** 2).sum((0, 2)) @ weights / ((goal**2).sum((0, 2)) @ weights)
            assert error == pytest.approx(float(ratio), rel=1e-3), (fit, float(ratio))


def test_weights_are_fitted_to_the_images_held_out_too() -> None:
    model, x = timm_vit(), images(20, 3, 32, 32)
    fast, report = fitted(model, "AASA", x, prefix_weight=3.0)
    both = lockstep(model, "AASA")
    seen, first = both.run(x, 2), report.fits[0]
    assert first.kept and first.part == ValueFit.part
    correction = ValueFit(both.converted.block(2))
    problem = correction.problem()
    features, tokens, goal = correction.rows(seen)
    weights = torch.ones(features.shape[:2])
    weights[:, 0] = 3
    rows = (features, goal - tokens, weights)
    problem.add(*(t.flatten(0, 1) for t in rows))
    with torch.no_grad():
        correction.write(correction.solve(problem, first.ridge))
    got = Lockstep(psvit.accelerate(model, "AAAA"), fast).run(x, 2).middle
    torch.testing.assert_close(got, both.run(x, 2).middle, rtol=1e-4, atol=1e-4)


def with_the_same_maps() -> nn.Module:
    """Layer 3 would compute the maps of layer 2, but from a V of its own."""
    model = timm_vit()
    donor, sharing = model.blocks[1], model.blocks[2]
    with torch.no_grad():
        for parameter in (*donor.attn.proj.parameters(), *donor.mlp.fc2.parameters()):
            parameter.zero_()  # so that both see the same tokens
        sharing.norm1.load_state_dict(donor.norm1.state_dict())
        for name in ("weight", "bias"):
            getattr(sharing.attn.qkv, name)[:48] = getattr(donor.attn.qkv, name)[:48]
    return model


def test_what_sharing_does_not_change_stays() -> None:
    model, x = with_the_same_maps(), images(20, 3, 32, 32)
    fast, report = fitted(model, "AASA", x)
    assert all(fit.after < 1e-10 for fit in report.fits), report.fits
    torch.testing.assert_close(answer(fast, x), answer(model, x), rtol=1e-4, atol=1e-4)


def test_v_and_output_projection_that_were_lost_are_found_again() -> None:
    both, x = lockstep(with_the_same_maps(), "AASA"), images(20, 3, 32, 32)
    block = both.converted.block(2)
    want = both.run(x, 2)
    correction = ValueFit(block)
    with torch.no_grad():
        for parameter in (block.attn.values[0], *block.attn.proj.parameters()):
            parameter.add_(0.02 * torch.randn_like(parameter))
    problem = correction.problem()
    features, tokens, goal = (rows.flatten(0, 1) for rows in correction.rows(both.run(x, 2)))
    problem.add(features, goal - tokens)
    start = problem.error(correction.start())
    with torch.no_grad():
        correction.write(correction.solve(problem, 1e-9))
    got = both.run(x, 2)
    lost = ((got.middle - want.middle) ** 2).sum() / start
    assert lost < 1e-2, (float(lost), start)


def layer_scale() -> nn.Module:
    return timm_vit(init_values=1.0)


@pytest.mark.parametrize("make", [timm_vit, layer_scale, TORCHVISION[0][1], HUB[0][1], HUB[3][1]])
def test_the_layer_computes_what_was_fitted(make: Make) -> None:
    both, x = lockstep(make(), "ASAA"), images(5, 3, 32, 32)
    block = both.converted.block(1)
    for part in (ValueFit, OutputFit, MLPFit):
        correction = part(block)
        n = correction.features
        parameters = correction.start()
        torch.testing.assert_close(_output(both, x, correction), _explicit(both, x, correction))
        parameters += 0.1 * torch.randn_like(parameters) * correction.scale
        if part is ValueFit:
            rank = block.attention_layer.output_projection.in_features // 3
            parts = [torch.linalg.svd(p, full_matrices=False) for p in parameters[:n].chunk(3)]
            parameters[:n] = torch.cat([u[:, :rank] * s[:rank] @ vh[:rank] for u, s, vh in parts])
        with torch.no_grad():
            correction.write(parameters)
        torch.testing.assert_close(correction.start(), parameters, rtol=1e-5, atol=1e-5)
        got, want = _output(both, x, correction), _explicit(both, x, correction)
        error = float((got - want).norm() / want.norm())
        assert error < 1e-5, (part, error)


def _output(both: Lockstep, x: Tensor, correction: Any) -> Tensor:
    """What the part of the layer adds to the tokens."""
    seen = both.run(x, 1)
    if isinstance(correction, MLPFit):
        return (seen.after.double() - seen.middle.double()).float()
    return (seen.middle.double() - seen.tokens.double()).float()


def _explicit(both: Lockstep, x: Tensor, correction: Any) -> Tensor:
    """Features times parameters; of V and output projection that is sum P_h X W_h + b."""
    features = correction.rows(both.run(x, 1))[0].double()
    parameters = correction.start()
    return (features @ parameters[:-1] + parameters[-1]).float()


def test_names_and_modes_stay_and_the_given_model_is_untouched() -> None:
    model, x = timm_vit(proj_drop_rate=0.5, drop_path_rate=0.5).train(), images(20, 3, 32, 32)
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    fast, report = fitted(model, "AS|AA", x)
    assert not report.left_alone
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    shapes = {n: p.shape for n, p in fast.state_dict().items() if ".pools." not in n}
    assert shapes == {n: p.shape for n, p in before.items()}
    assert fast.training and fast.blocks[1].training and not fast.norm.training
    assert not any(_hooks(m) for m in (*model.modules(), *find_stack(fast).modules()))
    restored = psvit.restore(fast)
    now = restored.state_dict()
    changed = {name for name, p in now.items() if not torch.equal(p, before[name])}
    parts = [f"blocks.{i}.{part}." for i in (1, 2) for part in ("attn.qkv", "attn.proj", "mlp.fc2")]
    assert changed <= {part + name for part in parts for name in ("weight", "bias")}, changed
    assert "blocks.1.attn.proj.weight" in changed
    qkv = "blocks.1.attn.qkv.weight"
    assert torch.equal(now[qkv][:48], before[qkv][:48])


def _hooks(module: nn.Module) -> list:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def test_two_runs_give_the_same_bits_and_batches_the_same_fit() -> None:
    model, x = timm_vit(), images(20, 3, 32, 32)
    first, again = (fitted(model, "AASA", x)[0].state_dict() for _ in range(2))
    parts, _ = fitted(model, "AASA", list(x.split(6)), batch=4)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
    fresh = images(2, 3, 32, 32)
    whole = fitted(model, "AASA", x)[0]
    torch.testing.assert_close(answer(parts, fresh), answer(whole, fresh), rtol=1e-3, atol=1e-3)


def test_a_normed_output_leaves_v_as_it_is() -> None:
    model = timm_vit(scale_attn_norm=True)
    fast, report = fitted(model, "ASAA", images(20, 3, 32, 32))
    assert [fit.part for fit in report.fits] == ["output projection", "last linear of the MLP"]
    assert torch.equal(fast.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)


def test_a_fit_that_would_be_too_large_leaves_v_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm_vit()
    heads, width = model.blocks[0].attn.num_heads, model.embed_dim
    for most, part in (
        (heads * width, "V and output projection"),
        (heads * width - 1, "output projection"),
    ):
        monkeypatch.setattr(correction, "MOST_FEATURES", most)
        _, report = fitted(model, "ASAA", images(12, 3, 32, 32))
        assert [fit.part for fit in report.fits] == [part, "last linear of the MLP"]


def test_an_mlp_of_another_kind_is_left_alone_and_named() -> None:
    model = timm_vit()
    model.blocks[1].mlp = nn.Sequential(nn.Linear(24, 24), nn.Tanh())
    _, report = fitted(model, "ASAA", images(20, 3, 32, 32))
    assert [fit.part for fit in report.fits] == ["V and output projection"]
    why = "last linear of the MLP: the MLP doesn't end with a linear"
    assert report.left_alone == {1: why}


def test_a_plain_schedule_needs_no_fit() -> None:
    model, x = timm_vit(), images(2, 3, 32, 32)
    fast, report = fitted(model, "AAAA", x)
    assert not report.fits
    torch.testing.assert_close(answer(fast, x), answer(model, x))


def test_images_all_alike_are_one_warning_and_finite_weights() -> None:
    x = images(1, 3, 32, 32).expand(20, -1, -1, -1)
    with pytest.warns(
        RankDeficientWarning, match=r"^images: 18 leave a fit short of \d+ indep"
    ) as w:
        fast, _ = fitted(timm_vit(), "ASSA", x)
    assert len(w) == 1
    assert all(p.isfinite().all() for p in fast.parameters())


def test_images_that_differ_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(timm_vit(), "AS|AA", images(30, 3, 32, 32))


def _once() -> Iterator[Tensor]:
    yield images()


@pytest.mark.parametrize(
    ("schedule", "x", "options", "error", "message"),
    [
        ("ASAA", (1, 3, 32, 32), {}, ValueError, r"images: got 1, expected at least 2, so that"),
        ("AAA|A", (11, 3, 32, 32), {}, None, ""),
        ("ASAA", (20, 3, 24, 32), {}, ValueError, r"images: got \(3, 24, 32\) each, which the mod"),
        (
            "ASAA",
            [torch.zeros(20, 3, 32, 32), torch.zeros(1, 3, 32, 24)],
            {},
            ValueError,
            r"images: got \(3, 32, 24\) each",
        ),
        ("ASAA", (3, 32, 32), {}, ValueError, r"images: got shape \(3, 32, 32\), expected \(B, ch"),
        ("ASAA", (0, 3, 32, 32), {}, ValueError, r"images: got none, expected at least one"),
        ("ASAA", [1], {}, TypeError, r"images: got int, expected a Tensor"),
        ("ASAA", None, {}, TypeError, r"images: got a generator, which can be read only once"),
        ("ASA", (20, 3, 32, 32), {}, ValueError, r'schedule "ASA": has 3 layers, expected 4'),
        ("A|SAA", (20, 3, 32, 32), {}, ValueError, r'schedule "A\|SAA": layer 2 shares across'),
        ("ASAA", (20, 3, 32, 32), {"ridge": 0}, ValueError, r"ridge: got 0, expected a number ab"),
        ("ASAA", (20, 3, 32, 32), {"batch": 0}, ValueError, r"batch: got 0, expected a whole num"),
    ],
)
def test_bad_input_is_named(
    schedule: str, x: Any, options: dict, error: type[Exception] | None, message: str
) -> None:
    batches = images(*x) if isinstance(x, tuple) and x[0] else x
    batches = torch.zeros(x) if isinstance(x, tuple) and not x[0] else batches
    batches = _once() if x is None else batches
    with pytest.raises(error, match="^" + message) if error else nullcontext():
        fitted(timm_vit(), schedule, batches, **options)


def test_the_least_number_of_images_is_told_right() -> None:
    model = timm_vit()
    with pytest.raises(ValueError, match=r"expected at least (\d+)") as caught:
        fitted(model, "AAA|A", images(2, 3, 32, 32))
    least = int(str(caught.value).split("at least ")[1].split(",")[0])
    with pytest.raises(ValueError, match=f"at least {least}"):
        fitted(model, "AAA|A", images(least - 1, 3, 32, 32))
    fitted(model, "AAA|A", images(least, 3, 32, 32))


def test_tokens_that_are_kept_fit_the_budget_and_change_nothing() -> None:
    model, batches = timm_vit(), images(12, 3, 32, 32).split(4)
    each = 4 * 65 * 24 * 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = psvit.accelerate(model, "A|AAS", pool="avg", size_bias=True)
    both = Lockstep(psvit.accelerate(model, "AAAA"), fast, budget=3 * each)
    fresh = Lockstep(psvit.accelerate(model, "AAAA"), fast)
    for layer in (1, 1, 3, 3):
        for place, batch in enumerate(batches):
            got, want = both.run(batch, layer, place), fresh.run(batch, layer)
            for name, value in vars(want).items():
                error = float((getattr(got, name) - value).abs().max())
                assert error < 1e-4, (layer, place, name, error)
            kept = sum(streams.nbytes for streams in both._kept.values())
            assert 0 < kept <= 3 * each, kept
    assert not fresh._kept


def test_hooks_go_when_a_pass_fails() -> None:
    both = lockstep(timm_vit(), "ASAA")
    block = both.converted.block(1)
    before = sum(len(_hooks(m)) for m in both.model.modules())
    block.mlp.fc2.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        both.run(images(), 1)
    assert sum(len(_hooks(m)) for m in both.model.modules()) == before


def test_targets_after_a_pool_are_the_originals_tokens_pooled() -> None:
    model, x = timm_vit(), images()
    both = lockstep(model, "AA|AA")
    seen = both.run(x, 2)
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for block in model.blocks[:3]:
        tokens = block(tokens)
    grid = tokens[:, 1:].unflatten(1, (8, 8))[:, ::2, ::2].flatten(1, 2)
    torch.testing.assert_close(seen.after_target, torch.cat([tokens[:, :1], grid], 1))


def test_the_table_has_a_row_for_each_fit_and_names_what_was_left_alone() -> None:
    model = timm_vit()
    model.blocks[1].mlp = nn.Sequential(nn.Linear(24, 24), nn.Tanh())
    _, report = fitted(model, "ASSA", images(20, 3, 32, 32))
    console = Console(file=io.StringIO(), width=120)
    console.print(report.table())
    text = console.file.getvalue()
    assert "layer 2 left alone: last linear of the MLP: the MLP doesn't end" in text, text
    for fit in report.fits:
        start = f" {fit.layer + 1} "
        (line,) = [x for x in text.splitlines() if x.startswith(start) and fit.part in x]
        assert f"{fit.before:.2%}" in line and f"{fit.held_out_after:.2%}" in line, line
    assert json.loads(json.dumps(report.to_dict()))["fits"][0]["layer"] == 1
