"""Train a small ViT on handwritten digits, convert it, fine-tune it, and see what was gained."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..console import print_tables, short, table
from ..timing import unsteady
from .common import add_json, need, positive, print_json, writing

EXAMPLES = """\
examples:
  psvit demo
  psvit demo --epochs 10 --output quick-demo
  psvit demo --seed 1 --json > demo.json

Nothing is downloaded. It takes about two minutes on two cores.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--epochs", type=positive, metavar="N", help="of training; fine-tuning takes 2/5 as many"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of weights and order (default: 0)"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="of PyTorch and the kernels")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("psvit-demo"),
        metavar="DIR",
        help="folder for the table and the pictures (default: psvit-demo)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    need("demo", "timm", "sklearn", "matplotlib")
    import torch

    from ..demo import Settings
    from ..demo import run as run_demo

    if args.threads:
        torch.set_num_threads(args.threads)
    chosen: dict[str, Any] = {"seed": args.seed}
    if args.epochs:
        chosen |= {"epochs": args.epochs, "tune_epochs": max(1, args.epochs * 2 // 5)}
    with writing("--output"):
        results = run_demo(Settings(**chosen), args.output)
    if args.json:
        print_json(results)
    else:
        _show(results, args.output)
    return 0


def _show(results: dict[str, Any], output: Path) -> None:
    contenders = ("PyTorch eager", "PyTorch SDPA", "psvit reference", "psvit cpu")
    rows = []
    for row in results["rows"]:
        latency = (row["latency"].get(name) for name in contenders)
        difference = row["largest_difference"]
        rows.append(
            (
                row["name"],
                f"{row['accuracy']:.1%}",
                short(row["params"]),
                short(row["flops"]),
                *("" if value is None else f"{value['median_ms']:.3g}" for value in latency),
                f"{row['speed_up']:.2f}x",
                "" if difference is None else f"{difference:.0e}",
            )
        )
    settings = results["settings"]
    header = (
        "",
        "accuracy",
        "params",
        "FLOPs",
        "eager",
        "SDPA",
        "psvit\nref",
        "psvit\ncpu",
        "speed",
        "max\ndiff",
    )
    title = f"A ViT on digits and its PSViT {results['schedule']} ({settings['pool']} pool)"
    print_tables(table(title, header, rows), *_remarks(results, output))


def _remarks(results: dict[str, Any], output: Path) -> list[str]:
    tests, settings = results["test_images"], results["settings"]
    remarks = [
        f"accuracy: on {tests} held-out images, one is {1 / tests:.1%}",
        f"eager, SDPA (timm, PyTorch), psvit ref, psvit cpu: ms for {settings['batch']} images, "
        f"median, threads: {results['threads']}, all in turn; psvit runs the original with every "
        "layer attending",
        "speed: over the original with SDPA",
        "max diff: largest difference of the class scores, compiled kernels from reference",
    ]
    every = [latency for row in results["rows"] for latency in row["latency"].values()]
    remarks += filter(None, [unsteady(every)])
    missing = results["providers"]["cpu"]
    if missing != "ready":
        remarks.append(f"No compiled kernels: {missing}")
    remarks.append(f"Took {results['seconds']:.0f} s. Written to {output}: results.json and PNGs.")
    return remarks
