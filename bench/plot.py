"""Pictures of results.

python -m bench.plot bench/results/NAME.json     of psvit bench: writes NAME.png beside it
python -m bench.plot DIR                         of bench.gpu: writes roofline.png and speedup.png
python -m bench.plot --markdown [DIR]            prints the GPU tables; without DIR, what is in them
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .gpu import report
from .gpu.report import Line
from .gpu.session import FILE, KIND

OURS, MUST, MOONSHOT = "#4472a8", "#222222", "#d08a1d"
FEEBLE = "#999999"

#: One for each kind of case.
COLORS = ("#4472a8", "#d08a1d", "#5a9a5a", "#a8446c")


# --- psvit bench ----------------------------------------------------------------------------


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
        marked = [(row[key], place) for place, row in enumerate(rows) if row[key]]
        _mark(axes, marked, color, label)
    _finish(axes, [row["label"] for row in rows])
    axes.set_xlabel("speed-up (whole models: divided by the ratio of FLOPs)")


def _mark(axes: Axes, marked: Sequence[tuple[float, int]], color: str, label: str) -> None:
    """What was to reach."""
    if marked:
        reach, places = zip(*marked, strict=True)
        axes.scatter(reach, places, marker="|", s=160, color=color, label=label)


def _finish(axes: Axes, labels: Sequence[str]) -> None:
    axes.axvline(1, color=FEEBLE, lw=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=6)
    axes.invert_yaxis()
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", fontsize=7)


def title(data: dict[str, Any]) -> str:
    return (
        f"psvit {data['commit'] or data['versions']['psvit']}, provider {data['provider']}, "
        f"{data['machine']['cpu']} ({data['machine']['cpu_capability']}), "
        f"{data['threads']} threads, torch {data['versions']['torch']}"
    )


def plot_cpu(data: dict[str, Any], target: Path) -> None:
    """Raises ValueError if nothing was measured."""
    rows = bars(data)
    if not rows:
        raise ValueError("holds no measured case")
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.26 * len(rows)), layout="constrained")
    draw_speed(axes, rows)
    axes.set_title(title(data), fontsize=7)
    figure.savefig(target, dpi=160)


# --- bench.gpu ------------------------------------------------------------------------------


def plot_gpu(data: dict[str, Any], folder: Path) -> None:
    """Raises ValueError if nothing was measured."""
    lines = report.lines(data)
    if not any(line.measured for line in lines):
        raise ValueError("holds no measured row")
    _save(roofline(lines), data, folder / "roofline.png")
    _save(speedups(lines), data, folder / "speedup.png")


def _save(figure: Figure, data: dict[str, Any], target: Path) -> None:
    figure.suptitle(report.machine_text(data), fontsize=6, wrap=True)
    figure.savefig(target, dpi=160)
    plt.close(figure)


def roofline(lines: Sequence[Line]) -> Figure:
    """FLOPs a second over FLOPs a byte, under what this machine was seen to do."""
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    drawn = [line for line in lines if line.measured and line.row["flops"] and line.row["bytes"]]
    kinds = dict.fromkeys(line.case.kind for line in drawn)
    for kind, color in zip(kinds, COLORS, strict=False):
        some = [line for line in drawn if line.case.kind == kind]
        points = [(_intensity(line), line.row["flops"] / line.seconds / 1e12) for line in some]
        across, up = zip(*points, strict=True)
        axes.scatter(across, up, s=14, color=color, label=kind, zorder=3)
        for line, point in zip(some, points, strict=True):
            label = line.title.split("/", 1)[1]
            axes.annotate(label, point, (4, -2), textcoords="offset points", fontsize=5)
    _roofs(axes, lines, [_intensity(line) for line in drawn] or [1.0])
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="TFLOP/s")
    axes.legend(loc="lower right", fontsize=7)
    measured = [line for line in lines if line.measured]
    others = {
        "no matrix product in it": [line for line in measured if not line.row["flops"]],
        "a whole network": [line for line in measured if not line.row["bytes"]],
    }
    _name_absent(figure, lines, others)
    return figure


def _intensity(line: Line) -> float:
    return line.row["flops"] / line.row["bytes"]


def _roofs(axes: Axes, lines: Sequence[Line], intensities: Sequence[float]) -> None:
    """Copy bandwidth, and the rate of matrix products in the dtypes that are drawn."""
    rates = lines[0].rates
    copy, matrix = rates["copy_bytes_per_s"], rates["matrix_flops_per_s"]
    shown = {name: matrix[name] for name in {line.case.dtype for line in lines} & set(matrix)}
    left, right = min(intensities) / 2, max(intensities) * 4
    for name, rate in shown.items():
        ridge = rate / copy
        ends = [left, ridge, max(right, 2 * ridge)]
        heights = [min(x * copy, rate) / 1e12 for x in ends]
        axes.plot(ends, heights, color=MUST, lw=0.9, label=f"measured: copy, {name} products")


def speedups(lines: Sequence[Line]) -> Figure:
    """Over the fastest of SDPA, else over the unconverted network, else over eager code."""
    rows = [(line, ratio) for line in lines if line.measured and (ratio := _ratio(line))]
    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.24 * len(rows)), layout="constrained")
    values = [ratio["median"] for _, ratio in rows]
    below = [ratio["median"] - ratio["p20"] for _, ratio in rows]
    above = [ratio["p80"] - ratio["median"] for _, ratio in rows]
    places = range(len(rows))
    axes.barh(places, values, xerr=[below, above], color=OURS, height=0.6, error_kw={"lw": 0.8})
    for moonshot, color, label in ((False, MUST, "must reach"), (True, MOONSHOT, "moonshot")):
        reach = [(_bar(line, moonshot), place) for place, (line, _) in enumerate(rows)]
        _mark(axes, [(bar, place) for bar, place in reach if bar], color, label)
    _finish(axes, [f"{line.title}\nvs {line.rival}" for line, _ in rows])
    axes.set_xlabel(
        "speed-up over the fastest of SDPA (pools: over eager; networks: unconverted), p20 to p80"
    )
    alone = [line for line in lines if line.measured and not _ratio(line)]
    _name_absent(figure, lines, {"nothing beside it": alone})
    return figure


def _ratio(line: Line) -> dict[str, float] | None:
    return line.speedup(line.rival)


def _bar(line: Line, moonshot: bool) -> float | None:
    """The speed-up to reach over whom the picture shows."""
    family = (line.rival or "").split("/")[0]
    scales = {"speed-up": 1.0, "flops": line.row.get("flops_ratio")}
    for bar in line.case.rows[line.name]:
        if bar.what in scales and (bar.over, bar.moonshot) == (family, moonshot):
            return bar.least * scales[bar.what]
    return None


def _name_absent(figure: Figure, lines: Sequence[Line], others: dict[str, list[Line]]) -> None:
    """What the picture leaves out, under it."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        if not line.measured:
            groups.setdefault(line.status, []).append(line)
    texts = [
        f"{reason}: {', '.join(line.title for line in some)}"
        for reason, some in (groups | others).items()
        if some
    ]
    if texts:
        figure.supxlabel("\n".join(texts), fontsize=5, wrap=True)


# --- the command ----------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", help="a JSON file, or a folder")
    parser.add_argument("--output", type=Path, help="PNG of a CPU file; default: beside it")
    parser.add_argument("--markdown", action="store_true", help="print the GPU tables instead")
    args = parser.parse_args(arguments)
    if args.results is None:
        if not args.markdown:
            parser.error("results: a JSON file of psvit bench, or a folder of bench.gpu")
        print(report.markdown(None), end="")
        return
    file = args.results / FILE if args.results.is_dir() else args.results
    try:
        data = json.loads(file.read_text())
        if data["kind"] != KIND:
            plot_cpu(data, args.output or file.with_suffix(".png"))
        elif args.markdown:
            print(report.markdown(data), end="")
        else:
            plot_gpu(data, file.parent)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{file}: not results of psvit bench or bench.gpu ({error})")


if __name__ == "__main__":
    main()
