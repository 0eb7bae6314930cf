"""Which layers compute nearly the same attention map, and which should share."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import print_tables, progress, say, table
from . import models
from .common import (
    BadInputError,
    add_json,
    bad_input,
    layers,
    need,
    open_result,
    positive,
    print_json,
)

if TYPE_CHECKING:
    from ..analyze import Analysis

EXAMPLES = """\
examples:
  psvit analyze vit_tiny_patch16_224 --weights vit.safetensors --images photos/
  psvit analyze vit_tiny_patch16_224 --weights vit.safetensors --images photos/ \\
      --shared 4 --pools 6 --output my-analysis
  psvit analyze hf:my-vit/ --images photos/ --select :32 --json

A hundred images are plenty: the averages hardly move after that.
"""
NOTE = (
    "The schedule has the largest sum of similarities between sharing layers and donors. That says "
    "where maps are redundant, not what accuracy remains: try it with psvit accelerate."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_arguments(parser)
    parser.add_argument(
        "--shared", type=int, metavar="N", help="layers that shall share (default: a third)"
    )
    parser.add_argument(
        "--pools",
        type=layers,
        default=(),
        metavar="L,M",
        help="pool tokens after these layers, counted from 1 (default: none)",
    )
    parser.add_argument(
        "--by", default="js", choices=("js", "cosine"), help="which similarity decides"
    )
    parser.add_argument(
        "--batch", type=positive, default=8, metavar="N", help="images read at a time (default: 8)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("psvit-analysis"),
        metavar="DIR",
        help="folder for analysis.json and attention-similarity.png (default: psvit-analysis)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..files import whole_folder

    need("demo", "matplotlib")
    if args.images is None:
        raise BadInputError("--images: expected a folder of images, or one image")
    with ExitStack() as stack:
        work = open_result(stack, whole_folder(args.output), "--output")
        result, analysis = _analysed(args)
        title = f"{args.model}, {result['schedule']} proposed"
        analysis.plot(work / "attention-similarity.png", by=args.by, title=title)
        (work / "analysis.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.json:
        print_json(result)
    else:
        _show(result, analysis, args)
    return 0


def _analysed(args: argparse.Namespace) -> tuple[dict[str, Any], Analysis]:
    from ..analyze import analyze

    files = models.select_images(args)
    loaded = models.load(args)
    if loaded.weights is None:
        say("no --weights: they are random, so the maps mean nothing")
    shared = _checked(loaded.depth, args)
    with progress("attention maps", len(files)) as step:
        stream = models.read_batches(files, loaded.preprocess, args.batch, step)
        analysis = analyze(loaded.model, stream)
    result = {
        "model": loaded.name,
        "weights": loaded.weights,
        "schedule": str(analysis.schedule(shared, args.pools, by=args.by)),
        "shared": shared,
        "by": args.by,
        **analysis.to_dict(),
    }
    return result, analysis


def _checked(depth: int, args: argparse.Namespace) -> int:
    """The number of sharing layers, held against the depth before anything is computed."""
    import torch

    from ..analyze import choose

    shared = args.shared
    if shared is None:
        shared = max(0, min(depth // 3, depth - 1 - len(args.pools)))
    with bad_input():
        choose(torch.ones(depth, depth), shared, args.pools)
    return shared


# --- what a person sees ---------------------------------------------------------------------


def _show(result: dict[str, Any], analysis: Analysis, args: argparse.Namespace) -> None:
    js, cosine = analysis.similarity("js"), analysis.similarity("cosine")
    donors = analysis.schedule(result["shared"], args.pools, by=args.by).donors
    rows = []
    for i, donor in enumerate(donors):
        rows.append(
            (
                str(i + 1),
                "attends" if donor == i else f"map of {donor + 1}",
                f"{js[i, i - 1]:.2f}" if i else "",
                f"{cosine[i, i - 1]:.2f}" if i else "",
                "" if donor == i else f"{analysis.similarity(args.by)[i, donor]:.2f}",
                f"{analysis.distance[i].mean():.1f}",
                f"{analysis.entropy[i].mean():.1f}",
            )
        )
    header = ("layer", "proposed", "JS to last", "cosine", "to donor", "distance", "entropy")
    title = f"{result['model']}: attention maps, averages of {analysis.images} images"
    print_tables(
        table(title, header, rows, left=2),
        "JS, cosine: similarity to the layer before, 0 to 1; distance in patches; entropy in bits.",
        f'Proposed schedule with {result["shared"]} sharing layers: "{result["schedule"]}"',
        NOTE,
        f"Written: {args.output / 'analysis.json'}, {args.output / 'attention-similarity.png'}",
    )
