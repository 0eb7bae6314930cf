"""What the initial maps of a model are: how much of each head's attention is on its target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..console import print_tables, table
from .shifts import Offset, Offsets, check_offsets, head_offsets, shift_filter
from .view import AttentionView, attention_views


class Row(NamedTuple):
    """One layer. Per head; the means are over the tokens whose target is inside of the grid.

    Args:
        layer: counted from 0.
        donor: the layer that makes its map: a sharing layer has no queries and keys of its own,
            and starts with its donor's map.
        offsets: (dy, dx) of each head's target.
        mass: attention on the target, 0 to 1.
        argmax: part of the tokens that look at their target more than at any other.
        missing: why its map doesn't follow from positions; then the others are empty.
    """

    layer: int
    donor: int
    offsets: tuple[Offset, ...] = ()
    mass: tuple[float, ...] = ()
    argmax: tuple[float, ...] = ()
    missing: str = ""


@dataclass(frozen=True)
class Report:
    """The maps that layers start with, made from the position embedding alone.

    Patches look at patches: the prefix tokens, the content of an image, and the bias for the sizes
    of pooled tokens are left out. ``print(report)`` shows a table.

    Args:
        rows: one a layer.
        remarks: what a person should know about them.
    """

    rows: tuple[Row, ...]
    remarks: tuple[str, ...] = ()

    @property
    def mass(self) -> float:
        """Mean over the layers that attend, and their heads; NaN if none was initialised."""
        return _mean([m for row in self.rows if row.donor == row.layer for m in row.mass])

    @property
    def argmax(self) -> float:
        """As ``mass``."""
        return _mean([a for row in self.rows if row.donor == row.layer for a in row.argmax])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"rows": [row._asdict() for row in self.rows], "remarks": list(self.remarks)}

    def show(self) -> None:
        """Prints the table and the remarks on standard output."""
        print_tables(self, *self.remarks)

    def __repr__(self) -> str:
        return f"Report({len(self.rows)} layers, mass {self.mass:.3f}, argmax {self.argmax:.3f})"

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, highlight=False, markup=False, color_system=None)
        with console.capture() as captured:
            for part in (self, *self.remarks):
                console.print(part)
        return captured.get().rstrip()

    def __rich__(self) -> Any:
        header = ("layer", "map", "mass", "lowest head", "argmax", "lowest head")
        rows = [(str(row.layer + 1), _origin(row), *_figures(row)) for row in self.rows]
        return table("Attention on the target, from the position embedding", header, rows, left=2)


def _origin(row: Row) -> str:
    return "its own" if row.donor == row.layer else f"of layer {row.donor + 1}"


def _figures(row: Row) -> Sequence[str]:
    if not row.mass:
        return ("", "", "", "")
    parts = _mean(row.mass), min(row.mass), _mean(row.argmax), min(row.argmax)
    return [f"{part:.3f}" for part in parts]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


# --- measuring ------------------------------------------------------------------------------


def measure(model: nn.Module, *, kernel_size: int = 3, offsets: Offsets = "fixed") -> Report:
    """The report of a model as it is, for instance of one that nobody initialised.

    Args:
        model: timm's VisionTransformer, or a PSViT model.
        kernel_size, offsets: the targets, as for ``impulse_init_`` ("random" would mean nothing).

    Raises:
        TypeError, ValueError: as ``impulse_init_``.
    """
    views = attention_views(model)
    if offsets == "random":
        raise ValueError('offsets: got "random", expected "fixed" or a list of (dy, dx)')
    check_offsets(offsets, kernel_size, smallest_grid(views))
    targets = {v.layer: head_offsets(offsets, kernel_size, v.heads, None) for v in views}
    return report_of(views, range(len(views)), targets)


def smallest_grid(views: Sequence[AttentionView]) -> tuple[int, int]:
    """Of the stages whose tokens have a position embedding."""
    grids = [view.places.grid for view in views if view.places.embedding is not None]
    return min(grid[0] for grid in grids), min(grid[1] for grid in grids)


def report_of(
    views: Sequence[AttentionView],
    layers: Sequence[int],
    targets: Mapping[int, tuple[Offset, ...]],
) -> Report:
    """The report of these layers, given the targets of those that attend."""
    rows: list[Row] = []
    for layer in layers:
        view = views[layer]
        if view.places.embedding is None:
            rows.append(Row(layer, view.donor, missing=view.places.missing))
        elif view.donor in targets:
            offsets = targets[view.donor]
            mass, argmax = _on_target(views[view.donor], offsets)
            rows.append(Row(layer, view.donor, offsets, mass, argmax))
        else:
            rows.append(Row(layer, view.donor))  # its donor wasn't chosen
    return Report(tuple(rows), tuple(_remarks(views, rows)))


def _on_target(
    view: AttentionView, offsets: tuple[Offset, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    queries, keys = projected(view)
    found = []
    for head, offset in enumerate(offsets):
        target = shift_filter(view.places.grid, offset)
        inside = target.any(1)
        probabilities = (queries[head] @ keys[head].T * view.scale).softmax(1)[inside]
        mass = (probabilities * target[inside]).sum(1).mean()
        hits = probabilities.argmax(1) == target[inside].argmax(1)
        found.append((float(mass), float(hits.double().mean())))
    mass_of_heads, argmax_of_heads = zip(*found, strict=True)
    return mass_of_heads, argmax_of_heads


def projected(view: AttentionView) -> tuple[Tensor, Tensor]:
    """Queries and keys of the position embedding, `(H, N, d)` float64 each."""
    found = []
    for weight, bias in ((view.query, view.query_bias), (view.key, view.key_bias)):
        assert weight is not None and view.places.embedding is not None
        y = view.places.embedding @ weight.double().cpu().T
        if bias is not None:
            y = y + bias.double().cpu()
        found.append(y.unflatten(1, (view.heads, -1)).transpose(0, 1))
    return found[0], found[1]


def _remarks(views: Sequence[AttentionView], rows: Sequence[Row]) -> list[str]:
    remarks = []
    shared = [row for row in rows if row.donor != row.layer and not row.missing]
    if shared:
        remarks.append(
            f"Layers without queries and keys of their own start with their donor's map: "
            f"{_numbers(shared)}."
        )
    for reason in dict.fromkeys(row.missing for row in rows if row.missing):
        without = [row for row in rows if row.missing == reason]
        remarks.append(f"Maps that don't follow from positions: {_numbers(without)} ({reason}).")
    uniform = [row for row in rows if is_uniform(views[row.layer], row)]
    if uniform:
        share = 1 / math.prod(views[uniform[0].layer].places.grid)
        remarks.append(f"Uniform maps, mass about 1/N ({share:.2%}): {_numbers(uniform)}.")
    return remarks


def is_uniform(view: AttentionView, row: Row) -> bool:
    """Whether a layer's heads look at their targets no more than twice as much as at chance."""
    return bool(row.mass) and _mean(row.mass) < 2 / math.prod(view.places.grid)


def _numbers(rows: Sequence[Row]) -> str:
    return ("layer " if len(rows) == 1 else "layers ") + ", ".join(str(r.layer + 1) for r in rows)
