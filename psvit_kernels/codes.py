"""The two 8-bit codes of attention maps: what every provider must agree on.

Both code e = p / max(row), which is in [0, 1]. A row is decoded as weight / sum(weights of the
row), so that it sums to 1 whatever rounding did.

- uint8: the low byte of 0.5 + 1.4921875 sqrt(e) as a bfloat16; all of those, from 0.5 to 1.9921875,
  have the same high byte. Weight: (that - 0.5)^2. The square root spends the codes where attention
  has its mass, on many small probabilities; and a bfloat16 is there again without a conversion,
  which a GPU does four times slower than arithmetic.
- float8_e4m3fn: 256 e, weight the value itself. Three bits of mantissa, 2^-17 of the maximum the
  smallest step.

Measured by ``bench/map_error.py`` on a pretrained ViT-Tiny (16 images, 12 layers, error of P V
relative to its norm): uint8 0.0016, e4m3 0.0071, an even uint8 (round(255 e)) 0.0157, a bfloat16
map 0.0009.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: By the name that ``attention(return_map=...)`` takes.
CODES = {"uint8": torch.uint8, "e4m3": torch.float8_e4m3fn}

#: High byte of a bfloat16 from 0.5 to 1.9921875, in the place that it has in a float32.
_HIGH_BYTE = 0x3F000000


def encode(e: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of probabilities relative to the largest of their row."""
    if dtype == torch.uint8:
        bits = (e.float().sqrt() * 1.4921875 + 0.5).view(torch.int32)
        return (bits + 0x8000 >> 16 & 0xFF).to(torch.uint8)  # rounded to the nearest
    return (e * 256).to(dtype)


def decode(code: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights that codes stand for, up to the scale of their row."""
    if code.dtype == torch.uint8:
        root = (code.to(torch.int32) << 16 | _HIGH_BYTE).view(torch.float32) - 0.5
        return root.to(dtype).square()
    return code.to(dtype)
