"""Find the schedule and the merging that lose least within a budget for a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import print_tables
from ..files import whole_file
from ..plots import draw_plan
from . import models
from .common import BadInputError, add_json, bad_input, need, positive, print_json, writing

if TYPE_CHECKING:
    from ..planning.plan import Plan

EXAMPLES = """\
examples:
  psvit plan vit_tiny_patch16_224 --weights vit.safetensors --images photos/ \\
      --budget "flops<=0.7" --output plan.json
  psvit accelerate vit_tiny_patch16_224 --weights vit.safetensors --plan plan.json

No labels, no gradients: some hundred images of the kind that the model is for. It takes some
minutes on two cores.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_arguments(parser)
    parser.add_argument(
        "--budget",
        required=True,
        metavar="TEXT",
        help='"flops<=0.7", "latency<=0.7" (of the model\'s own) or "top1_agreement>=0.98"',
    )
    add_pool(parser)
    parser.add_argument(
        "--pools", type=int, default=1, choices=(0, 1, 2), help="at most so many (default: 1)"
    )
    parser.add_argument("--no-merge", dest="merge", action="store_false", help="merge no tokens")
    parser.add_argument(
        "--latency-batch", type=positive, default=1, metavar="N", help="images (default: 1)"
    )
    add_output(parser)
    add_json(parser)


def add_pool(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pool",
        default="conv",
        choices=("conv", "avg", "stride", "max"),
        help="how tokens are pooled (default: conv, whose weights are fitted)",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("plan.json"),
        metavar="FILE.json",
        help="the plan, weights and a picture beside it (default: plan.json)",
    )


def run(args: argparse.Namespace) -> int:
    check(args)
    from ..planning.budget import Budget
    from ..planning.run import plan

    with bad_input():
        Budget.parse(args.budget)
    loaded = models.load(args)
    images = models.read_all(args, loaded.preprocess)
    with bad_input():
        found = plan(
            loaded.model,
            images,
            args.budget,
            pool=args.pool,
            merge=args.merge,
            pools=args.pools,
            latency_batch=args.latency_batch,
        )
    with writing("--output"):
        found.save(args.output)
        with whole_file(args.output.with_suffix(".png")) as work:
            draw_plan(found.found, work, title=f"{loaded.name}, {found.found['budget']}")
    if args.json:
        print_json({"schedule": found.schedule.text, "merge": found.merge, **found.found})
    else:
        _show(loaded.name, found, args.output)
    return 0


def check(args: argparse.Namespace) -> None:
    """What both commands that make plans need."""
    need("demo", "safetensors", "PIL", "matplotlib")
    if args.images is None:
        raise BadInputError("--images: missing; expected a folder of images to fit on")
    if args.output.suffix != ".json":
        raise BadInputError(f"--output: got {args.output}, expected a name that ends with .json")


def _show(name: str, plan: Plan, output: Path) -> None:
    found = plan.found
    print_tables(
        plan.table(),
        f"cost: part of the original's; error: squared, of the class scores, relative to theirs; "
        f"KL(original || converted) in nats, top-1 agreement: on {found['held_out_images']} images "
        f"held out; {found['images']} were fitted to, and at last all of them",
        f"Written to {output}, a picture beside it: psvit accelerate {name} --plan {output} "
        f"measures the plan.",
    )
