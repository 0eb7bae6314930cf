"""Search for a schedule and widths: train one supernet of all candidates, then let them evolve."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import print_tables, say, short, table
from .common import BadInputError, add_json, bad_input, need, one_line, positive, print_json
from .interrupt import Interrupt

if TYPE_CHECKING:
    from ..search.run import Progress, Search
    from ..search.space import SearchSpace
    from ..train.sources import Source

EXAMPLES = """\
examples:
  psvit search
  psvit search --data images/ --img-size 224 --limit "latency<=5ms" --output found
  psvit search --resume --output found

Candidates differ in depth, width and sharing layers of each stage. Their accuracies are compared on
a part of the training images that the supernet doesn't see; test images are not used. --output gets
front.json, front.png, and last.pt, from which --resume goes on. On digits it takes some minutes on
two cores.
"""

#: Models for images of so few pixels a side gain nothing from a second thread, and where others use
#: the processor too, threads wait for each other most of the time.
TINY = 16

#: What options are where neither they nor a search to go on with say otherwise.
DEFAULTS: dict[str, Any] = {
    "data": "digits",
    "limit": "flops<=0.5",
    "epochs": 60,
    "batch": 64,
    "lr": 1e-3,
    "population": 20,
    "generations": 10,
    "control": False,
    "latency_batch": 1,
    "seed": 0,
    "device": "cpu",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def add(flag: str, metavar: str | None = None, *, help: str = "", **more: Any) -> None:
        default = DEFAULTS.get(flag.strip("-").replace("-", "_"))
        said = f"(default: {default})" if default else ""
        more = {"metavar": metavar, **more} if metavar else more
        parser.add_argument(flag, default=argparse.SUPPRESS, help=f"{help} {said}".strip(), **more)

    add("--data", "NAME", help="what psvit train takes")
    add("--img-size", "N", type=positive, help="pixels of a side; else those of the first image")
    add(
        "--limit",
        "LIMIT",
        help='"flops<=0.5" (of the largest candidate\'s), "flops<=40M", "latency<=0.5", '
        '"latency<=3ms"',
    )
    add("--space", "FILE", type=Path, help='JSON as the "space" in front.json; else a ready one')
    add("--epochs", "N", type=positive, help="of the supernet")
    add("--batch", "N", type=positive, help="of its training")
    add("--lr", "X", type=float, help="highest learning rate")
    add("--population", "N", type=positive, help="candidates evaluated in a generation")
    add("--generations", "N", type=positive, help="of the evolution")
    add("--control", action="store_true", help="evaluate as many random candidates, to compare")
    add("--latency-batch", "N", type=positive, help="images of a call whose latency is measured")
    add("--seed", "N", type=int, help="of everything (default: 0)")
    add("--device", choices=("cpu", "cuda"))
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help=f"of PyTorch (default: its own; images of up to {TINY} pixels: 1)",
    )
    parser.add_argument(
        "--workers", type=positive, default=0, metavar="N", help="processes that load images"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("psvit-search"),
        metavar="DIR",
        help="(default: psvit-search)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from last.pt in --output")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    need("train", "timm", "torchvision", "sklearn", "matplotlib")
    from ..train.sources import CorruptImageError

    try:
        with Interrupt() as interrupt:
            with bad_input():
                search = _prepared(args, interrupt.progress)
            _say_space(search.space)
            results = search.run()
    except (CorruptImageError, FloatingPointError, OSError) as error:
        say(f"psvit search: error: {one_line(error)}")
        return 1
    except KeyboardInterrupt:
        say(f"psvit search: interrupted; psvit search --resume --output {args.output} goes on")
        return 130
    if args.json:
        print_json(results)
    else:
        _show(results, args.output)
    return 0


def _prepared(args: argparse.Namespace, progress: Progress) -> Search:
    """What the options say, over what the search to go on with says."""
    import torch

    from .. import checkpoint
    from ..search.data import held_out_data
    from ..search.run import Search, Settings
    from ..train.data import Loading
    from ..train.sources import open_source

    before = checkpoint.load(args.output, "search")["search"] if args.resume else {}
    options = {
        name: getattr(args, name, before.get(name, value)) for name, value in DEFAULTS.items()
    }
    settings = Settings(**{k: v for k, v in options.items() if k not in ("data", "batch")})
    source = open_source(options["data"])
    space = _space(args, source, before.get("space"))
    size = (space.img_size,) * 2 if isinstance(space.img_size, int) else space.img_size
    threads = args.threads or (1 if max(size) <= TINY else None)
    if threads is not None:
        torch.set_num_threads(threads)
    data = held_out_data(source, Loading(size, options["batch"], args.workers, settings.seed))
    about = {"data": options["data"], "batch": options["batch"]}
    return Search(
        space,
        data,
        settings,
        args.output,
        about=about,
        resume=args.resume,
        progress=progress,
    )


def _space(args: argparse.Namespace, source: Source, before: dict[str, Any] | None) -> SearchSpace:
    """That of the file, or of the search to go on with, or a ready-made one for the images."""
    from ..search.space import SearchSpace, default_space

    file, side = getattr(args, "space", None), getattr(args, "img_size", None)
    if file is not None:
        space = SearchSpace.from_dict(_read(file))
    elif before is not None and side is None:
        space = SearchSpace.from_dict(before)
    else:
        side = side or max(source.read(0, "train")[0].size)
        return default_space(side, source.channels, source.classes)
    for name, here in (
        ("in_chans", source.channels),
        ("num_classes", source.classes),
        ("img_size", side or space.img_size),
    ):
        if getattr(space, name) != here:
            raise BadInputError(
                f"--space: got {name} {getattr(space, name)}, expected {here} as the data and the "
                f"options have it"
            )
    return space


def _read(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInputError(f"{file}: not JSON: {one_line(error)}") from error
    if not isinstance(fields, dict):
        raise BadInputError(f"{file}: expected a JSON object")
    return fields


# --- what is shown --------------------------------------------------------------------------


def _say_space(space: SearchSpace) -> None:
    stages = [
        f"{min(depths)} to {max(depths)} layers of width {', '.join(map(str, widths))}"
        for depths, widths in zip(space.depths, space.widths, strict=True)
    ]
    say(f"{space.size():,} candidates; stages: {'; '.join(stages)}")


def _show(results: dict[str, Any], output: Path) -> None:
    latency = results["measure"] == "latency"
    header = ("schedule", "widths", "accuracy", "FLOPs", *(["latency"] if latency else []))
    rows = [
        (
            row["schedule"],
            ",".join(map(str, row["widths"])),
            f"{row['accuracy']:.1%}",
            short(row["flops"]),
            *([f"{row['latency_ms']:.3g} ms"] if latency else []),
        )
        for row in results["front"]
    ]
    evaluated = len(results["evaluated"]["evolution"])
    title = f"The front of {evaluated} of {results['candidates']:,} candidates"
    print_tables(table(title, header, rows, left=2), *_remarks(results, output))
    print(f"\nTrain the best:\n{train_command(results)}")  # one line, to be copied


def _remarks(results: dict[str, Any], output: Path) -> list[str]:
    images, best = results["held_out_images"], results["front"][-1]["accuracy"]
    error = math.sqrt(best * (1 - best) / images)
    remarks = [
        f"accuracy: with the supernet's weights, on {images} held-out training images; standard "
        f"error of the best {100 * error:.1f} points, and the best of many look better than they "
        f"are",
    ]
    if "random" in results["reach"]:
        found = {name: f"{value:.2%}" for name, value in results["reach"].items()}
        remarks.append(
            f"best accuracy for its cost, mean over all costs up to the limit: evolution "
            f"{found['evolution']}, as many random candidates {found['random']}"
        )
    remarks.append(f"Took {results['seconds']:.0f} s. Written to {output}: front.json and PNG.")
    return remarks


def train_command(results: dict[str, Any]) -> str:
    """What to type to train the most accurate candidate from scratch."""
    best, about = results["front"][-1], results["search"]
    data, space = about["data"], about["space"]
    names = ("dims", "pool", "head_dim", "mlp_ratio", "patch_size")
    arguments = ", ".join(f"{name}: {space[name]}" for name in names)
    widths = ",".join(map(str, best["widths"]))
    return (
        f"psvit train --data {shlex.quote(data)} --img-size {space['img_size']} --model psvit "
        f'--schedule "{best["schedule"]}" --widths {widths} --model-args "{{{arguments}}}"'
    )
