"""``psvit info``: versions, processor, threads, providers and why one is missing."""

from __future__ import annotations

import argparse

from .common import add_json, print_json

EXAMPLES = """\
examples:
  psvit info
  psvit info --json
"""

#: Libraries whose models psvit converts.
HOSTS = ("timm", "transformers", "torchvision")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from psvit_kernels.info import collect, show

    info = collect()
    versions = info["versions"]
    found = [name for name in HOSTS if versions[name]]
    if args.json:
        print_json({**info, "hosts": found})
        return 0
    missing = [name for name in HOSTS if not versions[name]]
    text = ", ".join(found) or "none"
    show(info, ("converts models of", text + (f" (not: {', '.join(missing)})" if missing else "")))
    return 0
