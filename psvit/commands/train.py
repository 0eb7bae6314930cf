"""Train a PSViT, or any model of timm: on one device, or on several with torchrun."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .common import add_json, bad_input, need, one_line, print_json
from .interrupt import Interrupt

EXAMPLES = """\
examples:
  psvit train --data digits --img-size 8 --model psvit --schedule "ASA|AS" --widths 96,128 \\
      --model-args "{patch_size: 1, head_dim: 32}" --epochs 20 --batch 64
  psvit train imagenet.yaml
  psvit train --resume --output psvit-train
  torchrun --nproc-per-node 8 -m psvit train imagenet.yaml --fsdp true

Every flag is a key of the YAML file too (img_size: 8), and wins over it. Values are written as in
YAML. The defaults are DeiT's recipe. DIR/last.pt is what a stopped run goes on from,
DIR/model.safetensors what `psvit accelerate --weights` takes.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..train.config import OPTIONS, Config

    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG.yaml", help="keys, values")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in the folder of --output"
    )
    for key, option in OPTIONS.items():
        default = Config.__dataclass_fields__[key].default
        said = (
            f" (default: {default})" if isinstance(default, (str, int, float)) and default else ""
        )
        parser.add_argument(
            f"--{key.replace('_', '-')}",
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=option.help.replace("%", "%%") + said,
        )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    need("train", "timm", "torchvision", "yaml", "safetensors", "matplotlib")
    from ..checkpoint import NAME
    from ..console import say
    from ..train.config import Config
    from ..train.loop import LossError, prepared
    from ..train.sources import CorruptImageError

    with bad_input():
        config = Config.of(_values(args))
    last = Path(config.output) / NAME
    try:
        with Interrupt() as interrupt, ExitStack() as stack:
            with bad_input():
                preparing = prepared(config, resume=args.resume, progress=interrupt.progress)
                trainer = stack.enter_context(preparing)
            trainer.train()
    except (LossError, CorruptImageError, OSError) as error:
        say(f"psvit train: error: {one_line(error)}{_kept(last)}")
        return 1
    except KeyboardInterrupt:
        say(f"psvit train: interrupted{_kept(last)}")
        return 130
    if trainer.group.first:
        say(f"Written to {config.output}: model.safetensors, metrics.jsonl, curves.png.")
        if args.json:
            print_json(trainer.run.history)
    return 0


def _values(args: argparse.Namespace) -> dict[str, Any]:
    """Keys and values: of the checkpoint, the file and the flags, the later ones win."""
    from ..train.config import OPTIONS, Config, read_yaml

    given = {} if args.config is None else read_yaml(args.config)
    given |= {key: _value(key, getattr(args, key)) for key in OPTIONS if hasattr(args, key)}
    if not args.resume:
        return given
    from .. import checkpoint

    folder = Path(given.get("output", Config.__dataclass_fields__["output"].default))
    return checkpoint.load(folder, "training run")["config"] | given


def _value(key: str, text: str) -> Any:
    """A flag's text as YAML has it."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{key}: got {text}, which is not YAML") from error


def _kept(last: Path) -> str:
    if not last.is_file():
        return "; no epoch was finished, and nothing is kept"
    return f"; {last} is whole: psvit train --resume --output {last.parent} goes on from it"
