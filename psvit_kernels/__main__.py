"""``python -m psvit_kernels [--json]``: what runs here and why."""

from __future__ import annotations

import argparse
import json

from .info import collect, show


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m psvit_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if args.json:
        print(json.dumps(collect(), indent=2))
    else:
        show(collect())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
