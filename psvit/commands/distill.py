"""Let a planned conversion learn from its original model: no labels."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import print_tables, say, table
from . import models
from .common import BadInputError, add_json, bad_input, one_line, positive, print_json, writing
from .plan import add_output, check

if TYPE_CHECKING:
    from ..planning.plan import Plan

EXAMPLES = """\
examples:
  psvit distill vit_tiny_patch16_224 --weights vit.safetensors --images photos/ \\
      --plan plan.json --output tuned.json
  psvit accelerate vit_tiny_patch16_224 --weights vit.safetensors --plan tuned.json

The model is its own teacher: from the first layer that the plan changes on, all layers learn its
outputs and prefix tokens, on --device. First on three quarters of the images: if that is no gain on
the last quarter, the plan stays as it was, else it learns from all of them.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_arguments(parser)
    parser.add_argument(
        "--plan", type=Path, required=True, metavar="FILE.json", help="what to start from"
    )
    parser.add_argument("--steps", type=positive, default=60, metavar="N", help="(default: 60)")
    parser.add_argument(
        "--batch", type=positive, default=64, metavar="N", help="images of a step (default: 64)"
    )
    parser.add_argument(
        "--lr", type=float, default=1e-4, metavar="X", help="learning rate (default: 1e-4)"
    )
    parser.add_argument(
        "--tune", default="all", choices=("all", "norms"), help="parameters (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default: cpu)")
    parser.add_argument(
        "--state", type=Path, metavar="DIR", help="folder for last.pt, from which --resume goes on"
    )
    parser.add_argument("--resume", action="store_true", help="go on from last.pt in --state")
    add_output(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    check(args)
    import torch

    from ..distill import Distillation, distill
    from ..planning.plan import Plan

    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadInputError("--device: got cuda, but PyTorch finds no GPU here")
    if args.resume and args.state is None:
        raise BadInputError("--resume: expected --state too, the folder to go on from")
    with bad_input():
        how = Distillation(args.steps, args.batch, args.lr, args.tune, seed=args.seed)
        plan = Plan.load(args.plan)
    loaded = models.load(args)
    images = models.read_all(args, loaded.preprocess)
    try:
        with bad_input():
            model = loaded.model.to(args.device)
            tuned = distill(model, plan, images, how, output=args.state, resume=args.resume)
    except FloatingPointError as error:
        say(f"psvit distill: error: {one_line(error)}; a lower --lr may help")
        return 1
    with writing("--output"):
        tuned.save(args.output)
    if args.json:
        print_json(tuned.found["distillation"])
    else:
        _show(loaded.name, tuned, args.output)
    return 0


def _show(name: str, plan: Plan, output: Path) -> None:
    found = plan.found["distillation"]
    rows = [
        (name, f"{row['error']:.3f}", f"{row['kl']:.3f}", f"{row['agreement']:.1%}")
        for name, row in (("before", found["before"]), ("after", found["rehearsed"]))
    ]
    gained = "has learnt from all images" if found["gained"] else "stays as it was: no gain"
    print_tables(
        table(f"{name} learns from itself", ("", "error", "KL", "agreement"), rows),
        "Squared error of the class scores, relative to the original's, KL(original || converted) "
        "in nats and top-1 agreement, on images held out, of a model that learnt from the others. "
        f"The plan {gained}.",
        f"Took {found['seconds']:.0f} s. Written to {output}: psvit accelerate {name} --plan "
        f"{output} measures it.",
    )
