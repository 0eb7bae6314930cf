"""How far 8-bit maps are from exact ones, in a trained model: ``python -m bench.map_error``.

The maps and values are those of each layer of a pretrained ViT-Tiny (timm's
``vit_tiny_patch16_224``, images normalised to -1..1). Written, as JSON: for each way to store a
map, over layers, the error of P V relative to its norm, and the total variation of rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

import psvit_kernels as pk
from psvit.images import Preprocess, find_images, load_image


def even(p: Tensor) -> Tensor:
    """8 bits without the square root, for comparison: round(255 p / max(row))."""
    weights = (p / p.amax(-1, keepdim=True) * 255).round()
    return weights / weights.sum(-1, keepdim=True)


STORED = {
    "bfloat16": lambda p: p.bfloat16(),
    "uint8": lambda p: pk.QuantizedMap.from_dense(p, "uint8").dense(),
    "e4m3": lambda p: pk.QuantizedMap.from_dense(p, "e4m3").dense(),
    "even uint8": even,
}


def errors(q: Tensor, k: Tensor, v: Tensor) -> dict[str, dict[str, float]]:
    """Of one layer's (B, H, N, d)."""
    q, k, v = q.double(), k.double(), v.double()
    p = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
    out, found = p @ v, {}
    for name, store in STORED.items():
        stored = store(p).double()
        variation = (stored - p).abs().sum(-1) / 2
        found[name] = {
            "output": float((stored @ v - out).norm() / out.norm()),
            "mean variation": float(variation.mean()),
            "worst variation": float(variation.max()),
        }
    return found


@torch.inference_mode()
def layers(model: torch.nn.Module, images: Tensor) -> list[dict[str, dict[str, float]]]:
    found: list[dict[str, dict[str, float]]] = []

    def look(attention: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        b, n, _ = inputs[0].shape
        qkv = attention.qkv(inputs[0]).reshape(b, n, 3, attention.num_heads, -1)
        found.append(errors(*qkv.permute(2, 0, 3, 1, 4)))

    hooks = [block.attn.register_forward_hook(look) for block in model.blocks]  # type: ignore
    model(images)
    for hook in hooks:
        hook.remove()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.map_error")
    for name in ("weights", "images", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    model = timm.create_model("vit_tiny_patch16_224").eval()
    model.load_state_dict({name: t.float() for name, t in load_file(args.weights).items()})
    preprocess = Preprocess(size=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)
    files = find_images(args.images)[:16]
    seen = layers(model, torch.stack([load_image(file, preprocess) for file in files]))
    table = {
        name: {
            "output": sum(layer[name]["output"] for layer in seen) / len(seen),
            "mean variation": sum(layer[name]["mean variation"] for layer in seen) / len(seen),
            "worst variation": max(layer[name]["worst variation"] for layer in seen),
        }
        for name in STORED
    }
    result = {"images": len(files), "layers": len(seen), "torch": torch.__version__, "error": table}
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
