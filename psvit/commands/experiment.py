"""Run one of the project's experiments, controls included, and see its table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..console import print_tables, say, short, table
from .common import BadInputError, add_json, bad_input, need, positive, print_json, writing

EXAMPLES = """\
examples:
  psvit experiment init
  psvit experiment init --seeds 5 --output init-5-seeds
  psvit experiment shapes
  psvit experiment shapes --data cifar10/ --patch 4 --device cuda --epochs 100 --images 5000
  psvit experiment shapes --json > shapes.json
  psvit experiment search
  psvit experiment convert --data data/ --seeds 1 --steps 0
  psvit experiment merge --data data/

init: what structured initialisation gains on few handwritten digits, and how much of it scaling
the position embedding gains alone. shapes: DeiT's shape, PSViT-1D and PSViT-2D at equal FLOPs, on
all handwritten digits or on images of 32 x 32. search: what evolution finds, beside as many random
candidates and a schedule written by hand, on digits. convert: what a trained ViT-Tiny keeps when
layers share maps, in closed form and distilled; it needs weights and images in --data, and takes
longest. merge: what it keeps when tokens are merged, beside plain PyTorch; on the same data. The
others take some minutes on two cores (with digits); nothing is downloaded. The folder
keeps each run as soon as it is finished: the same command goes on where it was stopped.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    init = names.add_parser("init", help="what structured initialisation gains")
    init.add_argument(
        "--epochs",
        type=positive,
        default=60,
        metavar="N",
        help="of training; the table has a third of them too (default: 60)",
    )
    init.add_argument(
        "--images", type=positive, default=200, metavar="N", help="of training (default: 200)"
    )
    shapes = names.add_parser("shapes", help="DeiT's shape and PSViT's at equal FLOPs")
    shapes.add_argument(
        "--data",
        default="digits",
        metavar="DATA",
        help="digits (default), a folder with CIFAR-10 as atlases, or an .npz file of 32 x 32",
    )
    shapes.add_argument(
        "--patch", type=positive, metavar="N", help="pixels, 2 or 4 (default: 4; digits: 1)"
    )
    shapes.add_argument(
        "--epochs", type=positive, metavar="N", help="of training (default: 100; digits: 12)"
    )
    shapes.add_argument("--images", type=positive, metavar="N", help="of training (default: all)")
    search = names.add_parser("search", help="what evolution gains over random candidates")
    convert = names.add_parser("convert", help="what a trained ViT-Tiny keeps")
    merge = names.add_parser("merge", help="what it keeps when tokens are merged")
    for one in (convert, merge):
        one.add_argument(
            "--data",
            required=True,
            metavar="DIR",
            help="folder with vit_tiny_patch16_224/model.safetensors and imagenet_val/",
        )
    convert.add_argument(
        "--images", type=positive, default=360, metavar="N", help="to fit to (default: 360)"
    )
    convert.add_argument(
        "--steps", type=int, default=60, metavar="N", help="of a distillation (default: 60)"
    )
    for one in (shapes, convert, merge):
        one.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    for one in (init, shapes, search):
        one.add_argument(
            "--processes", type=positive, metavar="N", help="at a time (default: 2; cuda: 1)"
        )
    for one in (init, shapes, search, convert):
        one.add_argument("--seeds", type=positive, default=3, metavar="N", help="(default: 3)")
    for one in (init, shapes, search, convert, merge):
        folder = Path(f"psvit-{one.prog.split()[-1]}")
        one.add_argument(
            "--output",
            type=Path,
            default=folder,
            metavar="DIR",
            help=f"folder for results.json, curves.png and runs (default: {folder})",
        )
        add_json(one)


def run(args: argparse.Namespace) -> int:
    need("demo", "timm", "sklearn", "matplotlib")
    try:
        results, show = EXPERIMENTS[args.name](args)
    except KeyboardInterrupt:
        say(f"interrupted; {args.output} has the finished runs, the same command goes on")
        return 130
    if args.json:
        print_json(results)
    else:
        print_tables(*show(results), _written(results, args.output))
    return 0


Results = dict[str, Any]
Show = Callable[[Results], list[Any]]


def _written(results: Results, output: Path) -> str:
    names = [name for name in ("results.json", "curves.png") if (output / name).exists()]
    return f"Took {results['seconds']:.0f} s. Written to {output}: {' and '.join(names)}."


def _percent(found: dict[str, float]) -> str:
    return f"{100 * found['mean']:.1f} ± {100 * found['deviation']:.1f}"


def _points(found: dict[str, float]) -> str:
    return f"{100 * found['mean']:+.1f}"


# --- init -----------------------------------------------------------------------------------


def _init(args: argparse.Namespace) -> tuple[Results, Show]:
    from ..experiments.init import Settings, check
    from ..experiments.init import run as run_experiment

    if args.epochs % 3:
        raise BadInputError(f"--epochs: got {args.epochs}, expected a multiple of 3")
    third = args.epochs // 3
    settings = Settings(
        seeds=args.seeds,
        images=args.images,
        epochs=args.epochs,
        every=next(step for step in (5, 2, 1) if third % step == 0),
        early=third,
        processes=args.processes or 2,
    )
    with bad_input():
        check(settings, args.output)
    with writing("--output"):
        return run_experiment(settings, args.output), _show_init


def _show_init(results: Results) -> list[Any]:
    settings = results["settings"]
    columns = [_header(settings[when]) for when in ("early", "epochs")]
    header = ("initialisation", *columns[0], *columns[1])
    rows = [
        (row["name"], *(cell for when in ("early", "end") for cell in _cells(row[when])))
        for row in results["rows"]
    ]
    title = f"Digits, {settings['images']} training images, {settings['seeds']} seeds"
    first = results["rows"][0]["name"]
    return [
        table(title, header, rows),
        _accuracy_is(results),
        f"scale: points over {first} that scaling the position embedding gains alone, where it is "
        f"scaled; rest: the other points over {first}",
    ]


def _header(epoch: int) -> tuple[str, str, str]:
    return f"epoch {epoch}\naccuracy", "\nscale", "\nrest"


def _cells(found: dict[str, dict[str, float]]) -> list[str]:
    return [_percent(found["accuracy"]), *(_points(found[part]) for part in ("scale", "rest"))]


def _accuracy_is(results: Results) -> str:
    return (
        f"accuracy: on {results['test_images']} held-out images, %, mean and standard deviation "
        "over the seeds"
    )


# --- shapes ---------------------------------------------------------------------------------


def _shapes(args: argparse.Namespace) -> tuple[Results, Show]:
    from ..experiments.shapes import check, settings_for
    from ..experiments.shapes import run as run_experiment

    with bad_input():
        settings = settings_for(
            args.data,
            args.patch,
            args.epochs,
            device=args.device,
            seeds=args.seeds,
            images=args.images,
            processes=args.processes or (1 if args.device == "cuda" else 2),
        )
        check(settings, args.output)
    with writing("--output"):
        return run_experiment(settings, args.output), _show_shapes


def _show_shapes(results: Results) -> list[Any]:
    shapes = results["shapes"]
    deit = next(iter(shapes.values()))["flops"]
    title = (
        f"Equal FLOPs, {results['images']} training images, {results['settings']['seeds']} seeds"
    )
    return [
        table(
            "Shapes",
            ("", "schedule", "widths", "tokens", "parameters", "FLOPs", "of DeiT's"),
            [_shape_cells(name, shape, deit) for name, shape in shapes.items()],
            left=2,
        ),
        table(title, _HEADER, [_result_cells(row) for row in results["rows"]], left=2),
        _accuracy_is(results) + f", after epoch {results['epochs'][-1]}",
        "over DeiT: points over DeiT's shape with this initialisation; over default: over this "
        "shape with the default; time: of a training epoch over that of DeiT's shape (medians)",
    ]


def _shape_cells(name: str, shape: dict[str, Any], deit: int) -> tuple[str, ...]:
    widths, tokens = (", ".join(map(str, shape[what])) for what in ("widths", "tokens"))
    flops = shape["flops"]
    part = f"{100 * flops / deit:.1f}%"
    return name, shape["schedule"], widths, tokens, short(shape["params"]), short(flops), part


_FOUND, _COST = ("accuracy", "over\nDeiT", "over\ndefault"), ("time", "images\nper s", "peak\nMB")
_HEADER = ("", "initialisation", *_FOUND, *_COST)


def _result_cells(row: dict[str, Any]) -> tuple[str, ...]:
    peak = row["peak_bytes"]
    return (
        row["shape"],
        row["initialisation"],
        _percent(row["accuracy"]),
        _points(row["over_deit"]),
        _points(row["over_default"]),
        f"{row['time']:.2f}x",
        f"{row['images_per_second']:.0f}",
        "" if peak is None else f"{peak / 1e6:.0f}",
    )


# --- search ---------------------------------------------------------------------------------


def _search(args: argparse.Namespace) -> tuple[Results, Show]:
    need("train", "torchvision")
    from ..experiments.search import Settings, check
    from ..experiments.search import run as run_experiment

    settings = Settings(seeds=args.seeds, processes=args.processes or 2)
    with bad_input():
        check(settings, args.output)
    with writing("--output"):
        return run_experiment(settings, args.output), _show_search


def _show_search(results: Results) -> list[Any]:
    settings = results["settings"]
    evaluated = settings["population"] * settings["generations"]
    reaches = [
        (
            f"seed {seed}",
            *(f"{100 * run['reach'][name]:.2f}" for name in ("evolution", "random")),
        )
        for seed, run in enumerate(results["searches"])
    ]
    means = (_percent(results["reach"][name]) for name in ("evolution", "random"))
    trained = [
        (
            name,
            *(f"{100 * run['trained'][name]['accuracy']:.1f}" for run in results["searches"]),
            _percent(results["accuracy"][name]),
        )
        for name in results["accuracy"]
    ]
    seeds = [f"seed {seed}" for seed in range(settings["seeds"])]
    by_hand = results["searches"][0]["trained"]["by hand"]
    return [
        table(
            f"Best held-out accuracy, %, mean over all costs up to {short(results['limit'])}FLOPs",
            (f"{evaluated} of {results['candidates']:,}", "evolution", "random"),
            [*reaches, ("all", *means)],
        ),
        table("The best of each trained from scratch", ("", *seeds, "all"), trained),
        f"from scratch: {settings['recipe']['epochs']} epochs, three times; accuracy, %, on "
        f"{results['test_images']} test images; each search's best that costs no more than "
        f"{by_hand['candidate']}, written by hand, {short(by_hand['flops'])}FLOPs",
    ]


# --- convert --------------------------------------------------------------------------------


def _convert(args: argparse.Namespace) -> tuple[Results, Show]:
    from ..experiments.convert import Settings, check
    from ..experiments.convert import run as run_experiment

    settings = Settings(
        args.data, seeds=args.seeds, images=args.images, steps=args.steps, device=args.device
    )
    with bad_input():
        check(settings, args.output)
    with writing("--output"):
        return run_experiment(settings, args.output), _convert_tables


def _convert_tables(results: Results) -> list[Any]:
    batches = dict.fromkeys(b for row in results["rows"] for b in row.get("latency", ()))
    header = ("", "schedule", "accuracy", "under", "agree", "FLOPs")
    speeds = [f"latency,\nbatch {batch}" for batch in batches]
    rows = [_convert_cells(row, batches) for row in results["rows"]]
    return [
        table(
            f"ViT-Tiny, {results['report_images']} images that nothing was fitted to",
            (*header, *speeds, "seconds"),
            rows,
            left=2,
        ),
        "naive: not corrected; under: points under the original; FLOPs, latency: parts of the "
        "original's; seconds: of scoring, fitting and choosing, or of distillation",
    ]


def _convert_cells(row: dict[str, Any], batches: Iterable[str]) -> tuple[str, ...]:
    base, _, variant = row["name"].partition(", ")
    speeds = row.get("latency", {})
    return (
        f"  {variant}" if variant else base,
        row["schedules"][0] if len(set(row["schedules"])) == 1 else "differ",
        _percent(row["accuracy"]),
        _points(row["under"]),
        f"{100 * row['agreement']['mean']:.1f}",
        f"{row['flops']['mean']:.3f}",
        *(f"{speeds[batch]['mean']:.3f}" if batch in speeds else "" for batch in batches),
        f"{row['seconds']['mean']:.0f}" if "seconds" in row else "",
    )


# --- merge ----------------------------------------------------------------------------------


def _merge(args: argparse.Namespace) -> tuple[Results, Show]:
    from ..experiments.merge import Settings, check
    from ..experiments.merge import run as run_experiment
    from .merge_tables import tables

    settings = Settings(args.data, device=args.device)
    with bad_input():
        check(settings, args.output)
    with writing("--output"):
        return run_experiment(settings, args.output), tables


EXPERIMENTS = {
    "init": _init,
    "shapes": _shapes,
    "search": _search,
    "convert": _convert,
    "merge": _merge,
}
