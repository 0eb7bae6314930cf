"""The command line: ``psvit COMMAND``, one of ``COMMANDS``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from types import ModuleType
from typing import NoReturn

from .commands import common

COMMANDS = {
    "demo": "train a small ViT on digits, convert it, and see what was gained",
    "accelerate": "convert a model of yours; cost, latency and agreement before and after",
    "analyze": "which layers compute nearly the same attention map",
    "plan": "find the schedule that loses least within a budget, corrected in closed form",
    "calibrate": "convert a trained model and correct it in closed form, without training",
    "distill": "let a converted model learn from its original, without labels",
    "train": "train a PSViT, or any model of timm",
    "search": "find a schedule and widths for your images and a limit of FLOPs or latency",
    "bench": "time the kernels and a converted model against PyTorch",
    "experiment": "one of the project's experiments, its controls included",
    "info": "what runs here and why: versions, processor, providers",
}

EXAMPLES = """\
examples:
  psvit demo
  psvit accelerate vit_tiny_patch16_224 --schedule "AAAAAA|AAAAAS" --weights vit.safetensors
  psvit analyze vit_tiny_patch16_224 --weights vit.safetensors --images photos/ --shared 4
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help says more)\n")


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("psvit")
    except metadata.PackageNotFoundError:
        return "(run from its source folder)"


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser; only the named command gets its options, since some need heavy imports."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="psvit",
        description="Faster vision transformers: token pooling and attention sharing.",
        epilog=EXAMPLES,
        formatter_class=layout,
    )
    parser.add_argument("--version", action="version", version=f"psvit {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, formatter_class=layout)
        if name == command:
            module = _module(name)
            sub.description, sub.epilog = module.__doc__, getattr(module, "EXAMPLES", None)
            module.add_arguments(sub)
    return parser


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"psvit.commands.{command}")


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv and argv[0] in COMMANDS else None
    try:
        args = build_parser(command).parse_args(argv)
        return _module(args.command).run(args)
    except common.BadInputError as error:
        print(f"psvit {command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"psvit {command}: interrupted, nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as in `psvit info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
