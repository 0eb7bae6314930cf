"""Convert a trained model and correct it in closed form: no labels, no gradients."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..console import print_tables
from . import models
from .common import add_json, add_merge, bad_input, print_json, writing
from .plan import add_output, add_pool, check

EXAMPLES = """\
examples:
  psvit calibrate vit_tiny_patch16_224 --weights vit.safetensors --images photos/ \\
      --schedule "AAAASAAA|AAAA" --output plan.json
  psvit accelerate vit_tiny_patch16_224 --weights vit.safetensors --plan plan.json

psvit plan chooses the schedule too.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_arguments(parser)
    parser.add_argument("--schedule", required=True, metavar="TEXT", help='such as "AASA|ASSS"')
    add_pool(parser)
    add_merge(parser)
    add_output(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    check(args)
    from ..calibrate import calibrate
    from ..planning.plan import Plan
    from ..pooling import CARRYING
    from ..schedule import Schedule
    from ..stack import find_stack

    loaded = models.load(args)
    with bad_input():
        carried = args.pool in CARRYING
        schedule = Schedule.parse(args.schedule, loaded.depth, carried=carried)
    images = models.read_all(args, loaded.preprocess)
    with bad_input():
        converted, report = calibrate(
            loaded.model, schedule, images, pool=args.pool, merge=args.merge or 0
        )
    plan = Plan.of(
        loaded.model,
        converted,
        schedule=schedule,
        pool=args.pool,
        dims=2,
        size_bias=True,
        merge=find_stack(converted).merge,
        found={"calibration": report.to_dict()},
    )
    with writing("--output"):
        plan.save(args.output)
    if args.json:
        print_json(report.to_dict())
    else:
        _show(report.table(), loaded.name, args.output)
    return 0


def _show(table: object, name: str, output: Path) -> None:
    print_tables(
        table,
        f"Written to {output}: psvit accelerate {name} --plan {output} measures it.",
    )
