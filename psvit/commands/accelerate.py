"""Convert a model of yours: cost of each layer, latency, and agreement with the original."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import print_tables, progress, say, short, table
from ..outputs import has_classes, logits_of
from ..stack import find_stack
from . import models
from .common import (
    BadInputError,
    add_json,
    add_merge,
    bad_input,
    need,
    open_result,
    positive,
    print_json,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..cost import LayerCost
    from ..images import Preprocess
    from ..schedule import Schedule

EXAMPLES = """\
examples:
  psvit accelerate vit_tiny_patch16_224 --schedule "AAAAAA|AAAAAS"
  psvit accelerate vit_tiny_patch16_224 --merge 13
  psvit accelerate vit_tiny_patch16_224 --schedule "AAAAAA|AAAAAS" --pool stride --size-bias \\
      --weights vit.safetensors --images photos/ --labels labels.csv
  psvit accelerate hf:my-vit/ --schedule "AAAAAAAAAAAS" --output fast.safetensors --json

schedule: one character a layer. A attends, S shares the map of the nearest A before it,
| pools the tokens between two layers. `psvit analyze` proposes one. Without fine-tuning, --merge
keeps most of what pretrained weights can do, then --pool stride --size-bias.
"""
NOT_TUNED = "Neither calibrated nor fine-tuned: what agreement is lost here, training can win back."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_arguments(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--schedule", metavar="TEXT", help='such as "AASA|ASSS"')
    which.add_argument(
        "--plan",
        type=Path,
        metavar="FILE.json",
        help="what psvit plan or psvit calibrate wrote: schedule, pool, corrected weights",
    )
    parser.add_argument(
        "--pool",
        default="max",
        choices=("max", "avg", "stride", "conv"),
        help="how tokens are pooled (default: max)",
    )
    parser.add_argument(
        "--dims", type=int, default=2, choices=(1, 2), help="pool the grid (2) or the sequence (1)"
    )
    parser.add_argument(
        "--size-bias",
        action="store_true",
        help="a pooled token counts for as many keys as it stands for",
    )
    add_merge(parser)
    parser.add_argument(
        "--protect",
        type=float,
        metavar="X",
        help="of what --merge merges, rather not what the class token looks at (as 0.05)",
    )
    parser.add_argument(
        "--show",
        type=Path,
        metavar="IMAGE",
        help="draw which patches of it were merged, as IMAGE-merged.png in the current folder",
    )
    parser.add_argument(
        "--strip", action="store_true", help="drop the Q and K parameters of sharing layers"
    )
    parser.add_argument(
        "--labels", type=Path, metavar="CSV", help="columns file,label: accuracy on the images too"
    )
    parser.add_argument(
        "--batch", type=positive, default=8, metavar="N", help="images at a time (default: 8)"
    )
    parser.add_argument(
        "--seconds", type=float, default=5, metavar="X", help="spent on each latency (default: 5)"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="of PyTorch and the kernels")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.safetensors", help="save the converted state dict"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    import torch

    from ..files import whole_file

    if args.threads:
        torch.set_num_threads(args.threads)
    with ExitStack() as stack:
        work = None
        if args.output is not None:
            need("demo", "safetensors")
            work = open_result(stack, whole_file(args.output), "--output")
        picture = None
        if args.show is not None:
            need("demo", "PIL", "matplotlib")
            picture = open_result(stack, whole_file(_picture(args.show)), "--show")
        result = _converted(args, work, picture)
    if args.json:
        print_json(result)
    else:
        _show(result)
    return 0


def _picture(image: Path) -> Path:
    return Path(f"{image.stem}-merged.png")


def _converted(args: argparse.Namespace, work: Path | None, picture: Path | None) -> dict[str, Any]:
    """Everything the command finds out; saves the state dict at ``work``, and draws what was merged
    at ``picture``, if there are such."""
    if args.schedule is None and args.plan is None and args.merge is None:
        raise BadInputError("expected one of --schedule, --plan and --merge")
    files = models.select_images(args) if args.images else []
    labels = _labels(args, files)
    loaded = models.load(args)
    if loaded.weights is None:
        say("no --weights: they are random, so only cost and latency mean something")
    with bad_input():
        fast, schedule = converted(loaded.model, args)
    if picture is not None:
        _draw_merges(fast, args.show, loaded.preprocess, picture)
    result = {
        "model": loaded.name,
        "weights": loaded.weights,
        "schedule": str(schedule),
        "pool": args.pool if schedule.pools else None,
        "dims": args.dims,
        "size_bias": args.size_bias,
        "merge": list(find_stack(fast).merge),
        "protect": find_stack(fast).protect,
        "tuned": args.plan is not None,
        **costs(loaded.model, fast, schedule, args),
        **speeds(loaded.model, fast, inputs(loaded.preprocess, files, args.batch), args.seconds),
        "agreement": None,
    }
    if files:
        result["agreement"] = agreement(
            loaded.model, fast, loaded.preprocess, files, labels, args.batch
        )
    if work is not None:
        from safetensors.torch import save_model

        save_model(fast, str(work))
        result["output"] = str(args.output)
    if picture is not None:
        result["picture"] = str(_picture(args.show))
    return result


def _labels(args: argparse.Namespace, files: Sequence[Path]) -> list[int] | None:
    from ..images import read_labels

    if args.labels is None:
        return None
    if not files:
        raise BadInputError("--labels: expected --images too")
    with bad_input():
        return read_labels(args.labels, files)


def converted(model: nn.Module, args: argparse.Namespace) -> tuple[nn.Module, Schedule]:
    """The converted copy and its schedule."""
    from .. import adapters
    from ..accelerate import convert_quietly
    from ..planning.plan import Plan
    from ..schedule import ATTEND

    if args.plan is not None:
        plan = Plan.load(args.plan)
        if args.strip:
            raise ValueError("--strip: expected without --plan, whose weights have Q and K")
        if args.merge is not None:
            raise ValueError("--merge: expected without --plan, which says what is merged")
        if args.protect is not None:
            raise ValueError("--protect: expected without --plan, which says what is protected")
        args.pool, args.dims, args.size_bias = plan.pool, plan.dims, plan.size_bias
        return plan.apply(model).eval(), plan.schedule
    text = args.schedule or ATTEND * len(adapters.find(model).layers)
    options = {"pool": args.pool, "dims": args.dims, "size_bias": args.size_bias}
    options |= {"merge": args.merge or 0, "protect": args.protect or 0.0}
    fast = convert_quietly(model, text, strip=args.strip, **options)
    return fast.eval(), find_stack(fast).schedule


def _draw_merges(fast: nn.Module, image: Path, preprocess: Preprocess, picture: Path) -> None:
    """Which patches of an image file are one token after each layer since the last pool."""
    import torch

    from ..plots import draw_merges
    from ..stack import record_merges

    stack = find_stack(fast)
    if not any(stack.merge):
        raise BadInputError("--show: expected --merge too: nothing is merged")
    x = next(models.read_batches([image], preprocess, 1))
    with torch.inference_mode(), record_merges(fast) as merges:
        fast(x)
    found = [merged.into for merged in merges if merged.into is not None]
    grid = stack.layouts(found[0].shape[1])[-1].grid
    if len(grid) != 2:
        raise BadInputError("--show: expected --dims 2: tokens pooled as a sequence have no grid")
    stage = stack.schedule.stages[-1]
    layers = [into[0, stack.prefix :].view(grid) for into in found[stage[0] :]]
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (preprocess.mean, preprocess.std))
    draw_merges(x[0] * std + mean, layers, picture, title=f"{image.name}: merged patches")


# --- cost -----------------------------------------------------------------------------------


def costs(
    model: nn.Module, fast: nn.Module, schedule: Schedule, args: argparse.Namespace
) -> dict[str, Any]:
    """FLOPs of one image and parameters in use, before and after, in all and layer by layer."""
    before = type(schedule)("A" * schedule.depth).rows(model)
    merge = find_stack(fast).merge
    after = schedule.rows(fast, pool=args.pool, dims=args.dims, merge=merge)
    flops = [sum(row.flops for row in rows) for rows in (before, after)]
    params = [sum(row.params for row in rows) for rows in (before, after)]
    return {
        "layers": [_layer(was, now, schedule) for was, now in zip(before, after, strict=True)],
        "flops": {"before": flops[0], "after": flops[1], "ratio": flops[0] / flops[1]},
        "params": {"before": params[0], "after": params[1]},
    }


def _layer(was: LayerCost, now: LayerCost, schedule: Schedule) -> dict[str, Any]:
    donor = schedule.donors[int(now.name) - 1] + 1 if now.kind == "S" else None
    return {
        "name": now.name,
        "kind": now.kind,
        "donor": donor,
        "tokens": {"before": was.tokens, "after": now.tokens},
        "flops": {"before": was.flops, "after": now.flops},
        "params": {"before": was.params, "after": now.params},
    }


# --- speed ----------------------------------------------------------------------------------


def speeds(model: nn.Module, fast: nn.Module, x: Tensor, seconds: float) -> dict[str, Any]:
    """Latency before and after, at batch 1 and of all of x; what the kernels change in outputs."""
    import torch

    from psvit_kernels import use

    with torch.inference_mode(), bad_input():
        after = logits_of(fast(x))
        with use("reference"):
            exact = logits_of(fast(x))
    return {
        "provider": _provider(),
        "threads": torch.get_num_threads(),
        "largest_difference_from_reference": float((after - exact).abs().max()),
        "latency": [_latency(model, fast, x[:size], seconds) for size in sorted({1, len(x)})],
    }


def inputs(preprocess: Preprocess, files: Sequence[Path], batch: int) -> Tensor:
    """A batch of the images, repeated if there are too few, or of noise."""
    import torch

    if not files:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, len(preprocess.mean), *preprocess.size, generator=generator)
    x = next(models.read_batches(files[:batch], preprocess, batch))
    return x.repeat(-(-batch // len(x)), 1, 1, 1)[:batch]


def _provider() -> str:
    from psvit_kernels import info, registry

    found = info.collect()
    if registry.forced() == "reference" or found["providers"]["cpu"] != "ready":
        return "reference"
    return f"cpu ({found['cpu']['in use by psvit']})"


def _latency(model: nn.Module, fast: nn.Module, x: Tensor, seconds: float) -> dict[str, Any]:
    from ..timing import interleaved

    contenders = {"before": lambda: model(x), "after": lambda: fast(x)}
    with progress(f"latency, batch {len(x)}", 1) as step:
        found = interleaved(contenders, seconds=seconds, step=step)
    return {
        "batch": len(x),
        "before": found["before"].to_dict(),
        "after": found["after"].to_dict(),
        "speed_up": found["before"].median / found["after"].median,
    }


# --- agreement ------------------------------------------------------------------------------


def agreement(
    model: nn.Module,
    fast: nn.Module,
    preprocess: Preprocess,
    files: Sequence[Path],
    labels: Sequence[int] | None,
    batch: int,
) -> dict[str, Any]:
    """How alike the outputs of both models are on images, and their accuracy if labels are given.

    A model without classes is judged by the cosine similarity of its features.
    """
    import torch

    from ..planning.score import Score

    if labels is not None and not has_classes(model):
        raise BadInputError("--labels: the model has no classes")
    outputs: list[list[Tensor]] = [[], []]
    with torch.inference_mode(), progress("agreement", len(files)) as step:
        for x in models.read_batches(files, preprocess, batch, step):
            for network, found in zip((model, fast), outputs, strict=True):
                found.append(logits_of(network(x)).double())
            _check_labels(labels, outputs[0][0].shape[1])
    before, after = torch.cat(outputs[0]), torch.cat(outputs[1])
    result: dict[str, Any] = {"images": len(files)}
    if not has_classes(model):
        alike = torch.nn.functional.cosine_similarity(before, after)
        return {**result, "feature_cosine": float(alike.mean())}
    score = Score.of(after, before)
    result |= {"top1_agreement": score.agreement, "kl_nats": score.kl}
    if labels is not None:
        truth = torch.tensor(labels)
        for name, scores in (("before", before), ("after", after)):
            result[f"accuracy_{name}"] = float((scores.argmax(1) == truth).double().mean())
    return result


def _check_labels(labels: Sequence[int] | None, classes: int) -> None:
    wrong = [label for label in labels or () if not 0 <= label < classes]
    if wrong:
        raise BadInputError(f"--labels: got class {wrong[0]}, expected 0 to {classes - 1}")


# --- what a person sees ---------------------------------------------------------------------

KINDS = {"A": "attends", "": ""}


def _show(result: dict[str, Any]) -> None:
    pools = f", {result['pool']} pool" if result["pool"] else ""
    merges = f", {sum(result['merge'])} tokens merged" if any(result["merge"]) else ""
    print_tables(
        _layer_table(result, f"{result['model']} as {result['schedule']}{pools}{merges}"),
        _summary_table(result),
        *_remarks(result),
    )


def _layer_table(result: dict[str, Any], title: str) -> Any:
    rows: list[tuple[str, ...]] = []
    for layer in result["layers"]:
        kind = KINDS.get(layer["kind"]) or (f"map of {layer['donor']}" if layer["donor"] else "")
        was, now = layer["tokens"]["before"], layer["tokens"]["after"]
        rows.append(
            (
                layer["name"],
                kind,
                str(was),
                str(now),
                short(layer["flops"]["before"]),
                short(layer["flops"]["after"]),
                short(layer["params"]["before"]),
                short(layer["params"]["after"]),
            )
        )
    total = [
        short(result[key][when]) for key in ("flops", "params") for when in ("before", "after")
    ]
    rows.append(("all", "", "", "", *total))
    header = ("layer", "", "tokens", "now", "FLOPs", "now", "parameters", "now")
    return table(title, header, rows, left=2)


def _summary_table(result: dict[str, Any]) -> Any:
    rows = [
        (
            "FLOPs of one image",
            short(result["flops"]["before"]),
            short(result["flops"]["after"]),
            f"{result['flops']['ratio']:.2f}x",
        )
    ]
    for row in result["latency"]:
        before, after = row["before"]["median_ms"], row["after"]["median_ms"]
        rows.append(
            (
                f"latency, batch {row['batch']} (median)",
                f"{before:.1f} ms",
                f"{after:.1f} ms",
                f"{row['speed_up']:.2f}x",
            )
        )
    agreed = result["agreement"] or {}
    if "accuracy_before" in agreed:
        was, now = agreed["accuracy_before"], agreed["accuracy_after"]
        change = f"{100 * (now - was):+.1f} points"
        rows.append((f"accuracy, {agreed['images']} images", f"{was:.1%}", f"{now:.1%}", change))
    return table("Before and after", ("", "original", "converted", ""), rows)


def _remarks(result: dict[str, Any]) -> list[str]:
    from ..timing import unsteady

    agreed = result["agreement"] or {}
    remarks = []
    if "top1_agreement" in agreed:
        remarks.append(
            f"On {agreed['images']} images: top-1 agreement {agreed['top1_agreement']:.1%}, "
            f"KL(original || converted) {agreed['kl_nats']:.3f} nats."
        )
    if "feature_cosine" in agreed:
        remarks.append(
            f"On {agreed['images']} images: cosine similarity of features "
            f"{agreed['feature_cosine']:.3f}."
        )
    remarks.append(
        f"Kernels: {result['provider']}, threads: {result['threads']}; largest difference of the "
        f"outputs from the reference kernels {result['largest_difference_from_reference']:.1e}."
    )
    every = [row[when] for row in result["latency"] for when in ("before", "after")]
    remarks += filter(None, [unsteady(every)])
    if not result["tuned"]:
        remarks.append(NOT_TUNED)
    if "output" in result:
        remarks.append(f"Saved: {result['output']}")
    if "picture" in result:
        remarks.append(f"Drawn: {result['picture']}")
    return remarks
