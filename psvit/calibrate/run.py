"""``calibrate``: a trained model converted, and the layers that this changes refitted in turn."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..accelerate import convert_quietly
from ..console import progress as console_progress
from ..merging import tokens_left
from ..numbers import check_number
from ..pooling import Kind
from ..schedule import ATTEND, SHARE, Schedule
from ..stack import Stack, find_stack
from .correction import Correction, MLPFit, OutputFit, ValueFit
from .images import HOLD_OUT, Images
from .lockstep import Lockstep
from .pools import MOST_IMAGES, fit_pools, tries
from .report import Fit, Report

Model = TypeVar("Model", bound=nn.Module)
Progress = Callable[[str, float], AbstractContextManager[Any]]


#: How strongly a fit is pulled towards the old weights, if nobody says so; the first where no
#: images are held out.
RIDGES = (1e-2, 1e-3, 1e-1, 1.0)


#: How many patch tokens a prefix token counts for, if nobody says so.
PREFIX_WEIGHT = 10.0


class RankDeficientWarning(UserWarning):
    """The images don't determine a fit; the ridge leaves what they don't say as it was."""


def calibrate(
    model: Model,
    schedule: str | Schedule,
    images: Tensor | Iterable[Tensor],
    *,
    pool: Kind = "conv",
    dims: Literal[1, 2] = 2,
    size_bias: bool = True,
    merge: int | Sequence[int] | str = 0,
    protect: float = 0.0,
    ridge: float | None = None,
    prefix_weight: float = PREFIX_WEIGHT,
    batch: int = 32,
    progress: Progress = console_progress,
) -> tuple[Model, Report]:
    """Converts a trained model, and refits in closed form the layers that this changes.

    No labels, no gradients. A learned pool ("conv") becomes a blend of one token of each cell of
    2 x 2 and the cell's average, scaled to the tokens' root mean square; which one is decided by
    the outputs. Then, layer by layer, with the earlier ones corrected already, those that share get
    the V, output projection and last MLP linear that bring their tokens nearest to the original's
    (put through the same pools and merged alike), the first after each pool V and output
    projection; where H heads times width C are more than ``MOST_FEATURES`` (ViT-B and larger), V
    stays as it is. Layers that only merge tokens stay as they are. All goes into weights that the
    layers have: the result is what ``psvit.accelerate`` gives, with other numbers in it, and costs
    nothing more when it runs.

    Twice for each of these layers the images are run through both models, a batch at a time. What
    is kept doesn't grow with their number: sums of products in float64, at most 16 n^2 bytes where
    n is the larger of H C (if V is fitted) and the MLP's hidden width; and 0.5 GiB of tokens at
    most, so that of up to about 2000 images (ViT-Tiny) or 500 (ViT-Base) each layer is run few
    times.

    Args:
        model, schedule, pool, dims, size_bias, merge, protect: as for ``psvit.accelerate``; the
            model is copied.
        images: `(B, channels, height, width)`, normalised as the model expects, or batches of
            them that can be read again and again in the same order: a list, a DataLoader that
            gives tensors and doesn't shuffle. One in ten is held out while it is decided how and
            whether a layer is corrected; the weights are fitted to all then.
        ridge: how strongly the fits are pulled towards the old weights, as a part of the mean of
            the features' squared norms. None: for each fit, of ``RIDGES`` the one with the
            smallest error on the images held out.
        prefix_weight: how many patch tokens a prefix token (class, distillation, registers) counts
            for.
        batch: images that are run at a time.
        progress: makes progress bars.

    Returns:
        The converted model, in the mode (train or eval) of the given one, and what was done to it.

    Raises:
        ValueError: as ``psvit.accelerate``; too few images to fit; images that the model refuses,
            or that give infinite tokens.
        TypeError: images that aren't tensors, or that can be read only once.

    Warns:
        RankDeficientWarning: the images don't determine a fit, being too much alike.

    Source: reduced-rank regression (Izenman 1975); that pretrained heads need aligning before
    their maps can be shared: LiSA, arXiv 2408.01890.
    """
    ridges = RIDGES if ridge is None else (ridge,)
    _check_above_zero(ridge=ridges[0], prefix_weight=prefix_weight)
    check_number("batch", batch, 1)
    fast, original = _both(model, schedule, pool, dims, size_bias, merge, protect)
    lockstep = Lockstep(original, fast)
    source = Images(images, batch)
    convert = partial(convert_quietly, model, pool=pool, dims=dims, size_bias=size_bias)
    with _in_eval_mode(fast):
        stack = lockstep.converted
        corrections, left_alone = _corrections(stack)
        _check_enough(lockstep, corrections, source)
        learned = stack.schedule.pools if pool == "conv" else ()
        runs = len(learned) * tries(dims) * min(source.count, MOST_IMAGES)
        fits, missing = [], 0
        with progress("calibrating", max(1, len(corrections) * source.count + runs)) as step:
            pools = fit_pools(convert, original, stack, source, step) if learned else []
            for correction in corrections:
                fit, rank = _fit(correction, lockstep, source, ridges, prefix_weight, step)
                fits.append(fit)
                missing = max(missing, correction.independent - rank)
    if missing:
        warnings.warn(
            f"images: {source.fitted} leave a fit short of {missing} independent features, as "
            f"images do that are too much alike; the ridge leaves the old weights there",
            RankDeficientWarning,
            stacklevel=2,
        )
    held_out = source.count - source.fitted
    return fast, Report(str(stack.schedule), source.fitted, held_out, fits, pools, left_alone)


def _both(
    model: Model,
    schedule: str | Schedule,
    pool: Kind,
    dims: Literal[1, 2],
    size_bias: bool,
    merge: int | Sequence[int] | str = 0,
    protect: float = 0.0,
) -> tuple[Model, Model]:
    """A converted copy of a model, and one as it is, in eval mode, of the same kind of blocks."""
    how: dict[str, Any] = {"pool": pool, "dims": dims, "size_bias": size_bias}
    fast = convert_quietly(model, schedule, merge=merge, protect=protect, **how)
    return fast, convert_quietly(model, ATTEND * len(find_stack(fast))).eval()


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _corrections(stack: Stack) -> tuple[list[Correction], dict[int, str]]:
    """What to fit, in order, and why something that ought to be fitted can't be.

    After a pool the MLP stays as it is: fitted too, it brought the tokens nearer to the original's
    and the outputs further from them.
    """
    found: list[Correction] = []
    left_alone: dict[int, list[str]] = {}
    for layer, kind in enumerate(stack.schedule.kinds):
        if kind != SHARE and layer not in stack.schedule.pools:
            continue
        block = stack.block(layer)
        attention = ValueFit if ValueFit.fits(block) else OutputFit
        for part in (attention, MLPFit) if kind == SHARE else (attention,):
            try:
                found.append(part(block))
            except ValueError as error:
                left_alone.setdefault(layer, []).append(f"{part.part}: {error}")
    return found, {layer: "; ".join(why) for layer, why in left_alone.items()}


class _Sample:
    """The problem of a correction on some of the images, and what its errors are relative to."""

    def __init__(self, correction: Correction) -> None:
        self.problem = correction.problem()
        self.norm = 0.0

    def add(self, features: Tensor, tokens: Tensor, goal: Tensor, weights: Tensor) -> None:
        """Of each token its features, what it is without the fitted part, and what it should be."""
        rows = (t.flatten(0, 1) for t in (features, goal - tokens, weights))
        self.problem.add(*rows)
        self.norm += float((goal.double().square().sum(2) * weights).sum())

    def error(self, parameters: Tensor) -> float:
        return self.problem.error(parameters) / self.norm


def _fit(
    correction: Correction,
    lockstep: Lockstep,
    source: Images,
    ridges: Sequence[float],
    prefix_weight: float,
    step: Callable[[float], object],
) -> tuple[Fit, int]:
    """Fits one part of one layer, and tells the rank of its features."""
    layer, prefix = correction.block.layer, lockstep.converted.prefix
    fitted, held_out = _Sample(correction), _Sample(correction)
    for place, (images, held) in enumerate(source):
        rows = correction.rows(lockstep.run(images, layer, place))
        weights = torch.ones(rows[0].shape[:2], dtype=torch.float64, device=rows[0].device)
        weights[:, :prefix] = prefix_weight
        for sample, chosen in ((fitted, ~held), (held_out, held)):
            if chosen.any():
                sample.add(*(t[chosen.to(t.device)] for t in (*rows, weights)))
        step(len(images))
    if not (fitted.problem.square + held_out.problem.square).isfinite():
        raise ValueError(f"images: layer {layer + 1} gives tokens that are no finite numbers")
    start, rank = correction.start(), fitted.problem.rank()
    judge = held_out if held_out.problem.rows else fitted
    # Judged on what it was fitted to, the weakest pull would always look best.
    tried = ridges if judge is held_out else ridges[:1]
    found = [correction.solve(fitted.problem, ridge) for ridge in tried]
    errors = [judge.error(parameters) for parameters in found]
    best = errors.index(min(errors))
    kept = errors[best] < judge.error(start)
    fit = Fit(
        layer,
        correction.part,
        tried[best],
        fitted.error(start),
        fitted.error(found[best]),
        judge.error(start) if judge is held_out else None,
        errors[best] if judge is held_out else None,
        kept,
    )
    if kept:
        fitted.problem.join(held_out.problem)
        with torch.no_grad():
            correction.write(correction.solve(fitted.problem, tried[best]))
    return fit, rank


def _check_above_zero(**numbers: float) -> None:
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name}: got {value!r}, expected a number above 0")


def fewest_images(
    model: nn.Module,
    schedule: str | Schedule,
    image: Tensor,
    *,
    pool: Kind = "conv",
    dims: Literal[1, 2] = 2,
    size_bias: bool = True,
    protect: float = 0.0,
) -> int:
    """How many images ``calibrate`` needs at least, those that it holds out among them.

    Args:
        model, schedule, pool, dims, size_bias, protect: as for ``calibrate``.
        image: one, `(1, channels, height, width)`.
    """
    fast, original = _both(model, schedule, pool, dims, size_bias, protect=protect)
    lockstep = Lockstep(original, fast)
    return _fewest(lockstep, _corrections(lockstep.converted)[0], image)


def _fewest(lockstep: Lockstep, corrections: list[Correction], image: Tensor) -> int:
    """So many that those not held out have as many tokens as any fit has parameters."""
    stack = lockstep.converted
    layouts = stack.layouts(lockstep.embed(image).shape[1])
    needed = 1
    for correction in corrections:
        layer = correction.block.layer
        tokens = layouts[stack.stages[layer]].tokens
        each = tokens_left(tokens, stack.prefix, stack.merge[: layer + 1])[-1]
        needed = max(needed, math.ceil((correction.features + 1) / each))
    return needed + (needed - 1) // (HOLD_OUT - 1)


def _check_enough(lockstep: Lockstep, corrections: list[Correction], source: Images) -> None:
    first, _ = next(iter(source))
    least = _fewest(lockstep, corrections, first[:1])
    if source.count < least:
        raise ValueError(
            f"images: got {source.count}, expected at least {least}, so that the tokens of those "
            f"not held out are as many as the parameters of a fit"
        )
