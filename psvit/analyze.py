"""Which layers of a vision transformer compute nearly the same attention map, measured.

``analyze`` runs images through a model and compares the maps of its layers; the ``Analysis`` that
it returns draws them and proposes which layers should share. For rows p and q of two maps (each
the attention of one query), with entropy H(p) = -sum_j p_j log2 p_j:

* Jensen-Shannon similarity: 1 - (H((p + q) / 2) - (H(p) + H(q)) / 2). The divergence is in bits,
  so the similarity lies between 0 (no key in common) and 1 (equal rows).
* cosine similarity: p . q / (|p| |q|).
* row entropy: H(p), in bits; log2 N where a query attends to all N tokens alike.
* mean attention distance: sum_j p_j |r_i - r_j| / sum_j p_j over patch tokens j only, for a patch
  token i at (row, column) r_i; in patches.

Each is averaged over all images and queries (patch queries for the distance), per head.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import adapters
from .accelerate import accelerate
from .schedule import ATTEND, Schedule
from .stack import Stack, find_stack, record_maps

#: Bytes of attention maps that are held at a time; images are taken in groups that fit.
MAP_BUDGET = 256 * 2**20

Measure = Literal["js", "cosine"]


@dataclass(eq=False)
class Analysis:
    """What ``analyze`` found. L layers, H heads; tensors are float64 on the CPU.

    Args:
        js: Jensen-Shannon similarity of layers i and j, head with the same head, `[L, L, H]`.
        cosine: cosine similarity, `[L, L, H]`.
        distance: mean attention distance in patches, `[L, H]`.
        entropy: mean row entropy in bits, `[L, H]`.
        tokens: number of tokens, prefix tokens included.
        prefix: number of prefix tokens (class, distillation, registers).
        grid: patches in a column and in a row.
        images: number of images that were averaged.
    """

    js: Tensor
    cosine: Tensor
    distance: Tensor
    entropy: Tensor
    tokens: int
    prefix: int
    grid: tuple[int, int]
    images: int

    @property
    def depth(self) -> int:
        return self.js.shape[0]

    @property
    def heads(self) -> int:
        return self.js.shape[2]

    def similarity(self, by: Measure = "js") -> Tensor:
        """Similarity of each pair of layers, averaged over heads, `[L, L]`."""
        if by not in ("js", "cosine"):
            raise ValueError(f'by: got {by!r}, expected "js" or "cosine"')
        return (self.js if by == "js" else self.cosine).mean(-1)

    def schedule(self, shared: int, pools: Sequence[int] = (), *, by: Measure = "js") -> Schedule:
        """The ``Schedule`` with ``shared`` sharing layers that are most similar to their donors.

        Among all schedules in which every stage starts with an attending layer and each sharing
        layer takes the map of the nearest attending layer before it, this one has the largest
        sum of similarities between sharing layers and donors. Found exactly; of equal ones, the
        one that shares later (in the first layer that differs it attends).

        The similarity is measured on the unchanged model, so it says where maps are redundant and
        not what accuracy remains: check that, and fine-tune.

        Args:
            shared: number of sharing layers, 0 to L minus the number of stages.
            pools: layers before which tokens are pooled, counted from 0: (4, 8) is
                ``A...|A...|A...`` with four layers in the first two stages.
            by: "js" or "cosine".

        Raises:
            ValueError: more sharing layers than fit, or a pool outside the model.
        """
        return Schedule.parse(choose(self.similarity(by), shared, pools), depth=self.depth)

    def plot(self, path: str | PathLike[str], *, by: Measure = "js", title: str = "") -> None:
        """Draws the similarities as a heat map beside distance and entropy; needs matplotlib.

        Args:
            path: the file, by its ending ``.png``, ``.pdf`` or ``.svg``.
            by: "js" or "cosine".
            title: put above the picture.
        """
        from .plots import draw_analysis

        draw_analysis(self, path, by=by, title=title)

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, lists and strings, ready for ``json.dump``."""
        return {
            "depth": self.depth,
            "heads": self.heads,
            "tokens": self.tokens,
            "prefix": self.prefix,
            "grid": list(self.grid),
            "images": self.images,
            "js_similarity": _rounded(self.similarity("js")),
            "cosine_similarity": _rounded(self.similarity("cosine")),
            "js_similarity_per_head": _rounded(self.js),
            "cosine_similarity_per_head": _rounded(self.cosine),
            "attention_distance_patches": _rounded(self.distance),
            "row_entropy_bits": _rounded(self.entropy),
        }


def analyze(
    model: nn.Module, images: Tensor | Iterable[Tensor], *, budget: int = MAP_BUDGET
) -> Analysis:
    """Compares the attention maps of a model's layers on images.

    The model itself is left as it is: its weights, its training flag and its modules. Images are
    taken a few at a time, so that the maps held at once stay below ``budget``.

    Args:
        model: a vision transformer that ``psvit.accelerate`` knows, not converted yet.
        images: `[B, C, height, width]`, normalised as the model expects, or an iterable of such
            batches. They are moved to the device and dtype of the model.
        budget: bytes of maps to hold at a time (at least one image is always taken).

    Raises:
        ValueError: a model that isn't supported or is converted already, or no image at all.
        TypeError: images that aren't tensors.
    """
    fast = _observed(model)
    stack = find_stack(fast)
    like = next(fast.parameters())
    sums: _Sums | None = None
    group = 1
    for batch in _batches(images):
        start = 0
        while start < len(batch):
            few = batch[start : start + group].to(like)
            start += len(few)
            with torch.inference_mode(), record_maps(fast) as maps:
                fast(few)
            if sums is None:
                layout = stack.layouts(maps[0].shape[-1])[0]
                sums = _Sums(maps, layout.prefix, (layout.grid[0], layout.grid[-1]))
                group = max(1, budget // sums.bytes_per_image)
            sums.add(maps)
    if sums is None:
        raise ValueError("images: got none, expected at least one")
    return sums.result()


def _observed(model: nn.Module) -> nn.Module:
    """A copy of the model in eval mode, converted so that its maps can be recorded."""
    container = adapters.find(model).container
    if not isinstance(container, Stack):
        depth = len(adapters.find(model).layers)
        return accelerate(model, ATTEND * depth).eval()
    if not container.schedule.is_plain:
        if container.built:
            raise ValueError(
                f'model: was made for its schedule "{container.schedule}"; analyze one of timm\'s '
                f"ViTs, or a PSViT whose layers all attend, without pools"
            )
        raise ValueError(
            f'model: is converted already, to schedule "{container.schedule}"; analyze the '
            f"original, or call psvit.restore on it first"
        )
    return copy.deepcopy(model).eval()


def _batches(images: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    for batch in [images] if isinstance(images, Tensor) else images:
        if not isinstance(batch, Tensor):
            raise TypeError(f"images: got {type(batch).__name__}, expected a Tensor")
        if batch.dim() != 4:
            raise ValueError(f"images: got shape {tuple(batch.shape)}, expected (B, C, h, w)")
        yield batch


class _Sums:
    """Running sums over images of what an ``Analysis`` averages."""

    def __init__(self, maps: Sequence[Tensor], prefix: int, grid: tuple[int, int]) -> None:
        layers, (_, heads, rows, self.tokens) = len(maps), maps[0].shape
        self.prefix, self.grid = prefix, grid
        self.js = torch.zeros(layers, layers, heads, dtype=torch.float64)
        self.cosine = torch.zeros_like(self.js)
        self.entropy = torch.zeros(layers, heads, dtype=torch.float64)
        self.distance = torch.zeros_like(self.entropy)
        self.apart = distances(grid).to(maps[0].device, torch.float32)
        self.images = 0
        self.bytes_per_image = 4 * layers * heads * rows * self.tokens

    def add(self, maps: Sequence[Tensor]) -> None:
        """Maps of one forward pass, one `[B, H, N, N]` a layer."""
        maps = [m.float() for m in maps]
        entropies = [_entropy(m) for m in maps]  # (B, H, N) each
        self.images += len(maps[0])
        self.cosine += _over_images(_cosines(maps)).permute(1, 2, 0)
        for i, p in enumerate(maps):
            self.entropy[i] += _over_rows(entropies[i])
            self.distance[i] += _over_rows(self._distance(p))
            for j in range(i):
                mixed = _entropy((p + maps[j]).mul_(0.5))
                self.js[i, j] += _over_rows(1 - mixed + (entropies[i] + entropies[j]) / 2)

    def _distance(self, p: Tensor) -> Tensor:
        patches = p[..., self.prefix :, self.prefix :]
        mass = patches.sum(-1).clamp_min(torch.finfo(p.dtype).tiny)
        return (patches * self.apart).sum(-1) / mass

    def result(self) -> Analysis:
        rows = self.images * self.tokens
        return Analysis(
            js=_symmetric(self.js / rows),
            cosine=self.cosine / rows,
            distance=self.distance / (self.images * len(self.apart)),
            entropy=self.entropy / rows,
            tokens=self.tokens,
            prefix=self.prefix,
            grid=self.grid,
            images=self.images,
        )


def distances(grid: tuple[int, int]) -> Tensor:
    """Euclidean distance between all patches of a grid, in patches, `[h * w, h * w]`, float64."""
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")


def _entropy(p: Tensor) -> Tensor:
    """Bits, over the last dimension; 0 log 0 = 0."""
    return torch.special.entr(p).sum(-1) / math.log(2)


def _over_rows(values: Tensor) -> Tensor:
    """`[B, H, rows]` summed over images and rows, in float64 on the CPU."""
    return _over_images(values.sum(-1))


def _over_images(values: Tensor) -> Tensor:
    return values.to("cpu", torch.float64).sum(0)


def _cosines(maps: Sequence[Tensor]) -> Tensor:
    """Of each pair of layers, summed over rows, `[B, H, L, L]`: products of unit vectors."""
    units = torch.stack([m / m.norm(dim=-1, keepdim=True) for m in maps], dim=2).flatten(3)
    return units @ units.transpose(2, 3)


def _symmetric(lower: Tensor) -> Tensor:
    """`[L, L, H]` from its part below the diagonal; a layer equals itself."""
    full = lower + lower.transpose(0, 1)
    full.diagonal().fill_(1.0)
    return full


def choose(similarity: Tensor, shared: int, pools: Sequence[int] = ()) -> str:
    """The schedule, as text, that ``Analysis.schedule`` describes; exact, by dynamic programming.

    Args:
        similarity: of each pair of layers, `[L, L]`; entry [i, j] with i > j counts when layer i
            takes the map of layer j.
        shared: number of sharing layers.
        pools: layers before which tokens are pooled, counted from 0.

    Raises:
        ValueError: more sharing layers than fit, or a pool outside the model.
    """
    depth, starts = len(similarity), {0, *pools}
    if len(starts) != len(pools) + 1 or not all(0 < p < depth for p in pools):
        raise ValueError(
            f"pools: got {tuple(pools)}, expected different layers from 1 to {depth - 1}"
        )
    most = depth - len(starts)
    if not 0 <= shared <= most:
        raise ValueError(
            f"shared: got {shared}, expected 0 to {most} for {depth} layers in "
            f"{len(starts)} stages: the first layer of each stage attends"
        )
    gain = similarity.tolist()

    @functools.cache
    def best(layer: int, donor: int, left: int) -> tuple[float, str]:
        """Largest sum from this layer on, and its letters."""
        if layer == depth:
            return (0.0 if left == 0 else -math.inf), ""
        rest, letters = best(layer + 1, layer, left)
        choice = rest, "A" + letters
        if layer not in starts and left > 0:
            rest, letters = best(layer + 1, donor, left - 1)
            if gain[layer][donor] + rest > choice[0]:
                choice = gain[layer][donor] + rest, "S" + letters
        return choice

    letters = best(0, 0, shared)[1]
    return "".join("|" * (i in pools) + letter for i, letter in enumerate(letters))


def _rounded(values: Tensor) -> Any:
    return torch.round(values, decimals=6).tolist()
