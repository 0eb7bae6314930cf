"""Draws a file that ``psvit bench --json --output FILE`` wrote.

python bench/plot.py bench/results/NAME.json            writes NAME.png beside it
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

OURS, MUST, MOONSHOT = "#4472a8", "#222222", "#d08a1d"


def bars(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Every comparison, with the name of its case."""
    return [
        comparison | {"label": f"{row['case']}\nvs {comparison['baseline']}"}
        for row in data["rows"]
        for comparison in row["against"]
    ]


def draw_speed(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Speed-ups (over the ratio of FLOPs for whole models), p20 to p80, and what was to reach."""
    places = range(len(rows))
    values = [row["value"] for row in rows]
    spread = [
        [row["value"] - row["p20"] / row["per"] for row in rows],
        [row["p80"] / row["per"] - row["value"] for row in rows],
    ]
    axes.barh(places, values, xerr=spread, color=OURS, height=0.6, error_kw={"lw": 0.8})
    for key, color, label in (("must", MUST, "must reach"), ("moonshot", MOONSHOT, "moonshot")):
        marked = [place for place in places if rows[place][key]]
        if marked:
            reach = [rows[place][key] for place in marked]
            axes.scatter(reach, marked, marker="|", s=160, color=color, label=label)
    axes.axvline(1, color="#999999", lw=0.8)
    axes.set_yticks(places, [row["label"] for row in rows], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("speed-up (whole models: divided by the ratio of FLOPs)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", fontsize=7)


def title(data: dict[str, Any]) -> str:
    return (
        f"psvit {data['commit'] or data['versions']['psvit']}, provider {data['provider']}, "
        f"{data['machine']['cpu']} ({data['machine']['cpu_capability']}), "
        f"{data['threads']} threads, torch {data['versions']['torch']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="JSON of psvit bench")
    parser.add_argument("--output", type=Path, help="PNG; default: beside the JSON")
    args = parser.parse_args()
    try:
        data = json.loads(args.file.read_text())
        rows = bars(data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{args.file}: not a file of psvit bench --json ({error})")
    if not rows:
        parser.error(f"{args.file}: holds no measured case")
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.26 * len(rows)), layout="constrained")
    draw_speed(axes, rows)
    axes.set_title(title(data), fontsize=7)
    figure.savefig(args.output or args.file.with_suffix(".png"), dpi=160)


if __name__ == "__main__":
    main()
