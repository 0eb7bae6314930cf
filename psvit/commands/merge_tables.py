"""What ``psvit experiment merge`` shows."""

from __future__ import annotations

from typing import Any

from ..console import table

Results = dict[str, Any]


def tables(results: Results) -> list[Any]:
    """Of each part a table, and what its words mean."""
    parts = results["parts"]
    found = [*_constant(parts["constant"], results["report_images"])]
    found.append(_planned(parts["planned"]))
    for name, part in parts.items():
        if name.startswith("sharing"):
            found.append(_front(name, part))
    found.append(_slimming(parts["slimming"]))
    found.append(_speed(parts["speed"]))
    return found


def _speeds(rows: list[dict[str, Any]]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Headers, and the cells of each row."""
    batches = list(rows[0]["latency"])
    names = [f"latency,\nbatch {b}" if i == 0 else "in plain" for b in batches for i in (0, 1)]
    cells = [
        tuple(f"{row['latency'][b][who]:.3f}" for b in batches for who in ("psvit", "plain"))
        for row in rows
    ]
    return names, cells


def _constant(part: Results, images: int) -> tuple[Any, str]:
    names, speeds = _speeds(part["rows"])
    rows = [
        (
            str(row["merge"]),
            *(f"{row[key]:.1%}" for key in ("accuracy", "plain_accuracy", "same")),
            f"{row['flops']:.3f}",
            *cells,
        )
        for row, cells in zip(part["rows"], speeds, strict=True)
    ]
    header = ("r", "accuracy", "in plain", "same class", "FLOPs", *names)
    return (
        table(f"ViT-Tiny, tokens merged, {images} images", header, rows),
        f"r: pairs that every layer merges; in plain: the algorithm in plain PyTorch; FLOPs, "
        f"latency: parts of the original's, whose accuracy is {part['original']:.1%}",
    )


def _planned(part: Results) -> Any:
    rows = [
        (
            row["name"],
            row["schedule"],
            " ".join(map(str, row["merge"])),
            f"{row['protect']:g}",
            f"{row['accuracy']:.1%}",
            f"{row['flops']:.3f}",
            f"{row['seconds']:.0f}",
        )
        for row in part["rows"]
    ]
    header = ("", "schedule", "merged in each layer", "protect", "accuracy", "FLOPs", "seconds")
    title = f"As psvit.plan chooses by other images; the original has {part['original']:.1%}"
    return table(title, header, rows, left=3)


def _front(name: str, part: Results) -> Any:
    rows = [
        (
            row["schedule"],
            str(row["merge"]),
            f"{row['accuracy']:.1%}",
            f"{row['flops']:.3f}",
            "front" if row["on_front"] else "",
        )
        for row in sorted(part["rows"], key=lambda row: -row["flops"])
    ]
    title = f"{name}: the map follows the tokens; the original has {part['original']:.1%}"
    return table(title, ("schedule", "r", "accuracy", "FLOPs", ""), rows, left=1)


def _slimming(part: Results) -> Any:
    rows = [
        (row["method"], str(row["keep"]), f"{row['accuracy']:.1%}", f"{row['flops']:.3f}")
        for row in part["rows"]
    ]
    title = "Other ways to have fewer tokens, without training"
    return table(title, ("method", "keeps", "accuracy", "FLOPs"), rows, left=1)


def _speed(part: Results) -> Any:
    names, speeds = _speeds(part["rows"])
    rows = [
        (row["model"], str(row["merge"]), f"{row['flops']:.3f}", *cells)
        for row, cells in zip(part["rows"], speeds, strict=True)
    ]
    return table("Larger models, random weights", ("model", "r", "FLOPs", *names), rows, left=1)
