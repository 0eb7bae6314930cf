"""``psvit bench``: the kernels and a converted model against PyTorch; see ``psvit.bench``."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from psvit import bench

    bench.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from psvit import bench

    return bench.main(args)
