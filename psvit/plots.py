"""The pictures: similarity of attention maps, accuracy against latency, attention on an image.

matplotlib is imported when a picture is drawn, and only its file-writing part: no window opens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .analyze import Analysis

#: Two colours that stay apart in print and for colour-blind readers.
BLUE, ORANGE = "#2b6ca3", "#d2691e"
NAMES = {"js": "Jensen-Shannon similarity", "cosine": "cosine similarity"}


def _figure(width: float, height: float) -> Any:
    """An empty figure, in inches, at 150 dots an inch."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError(
            'drawing needs matplotlib: pip install "psvit[demo]"', name="matplotlib"
        ) from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


# --- analysis -------------------------------------------------------------------------------


def draw_analysis(
    analysis: Analysis, path: str | PathLike[str], *, by: str = "js", title: str = ""
) -> None:
    """The heat map of similarities between layers, beside distance and entropy of each layer."""
    figure = _figure(11, 5.6)
    figure.suptitle(title or f"Attention maps of {analysis.depth} layers")
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    _heat_map(left, analysis.similarity(by), f"{NAMES[by]}, mean of {analysis.heads} heads")  # type: ignore[arg-type]
    upper, lower = right.subplots(2, 1, sharex=True)
    _per_layer(upper, analysis.distance, "mean attention distance", "patches")
    _per_layer(lower, analysis.entropy, "row entropy", "bits")
    lower.set_xlabel("layer")
    upper.legend(loc="best", fontsize=8, frameon=False)
    figure.supxlabel(
        f"averages over {analysis.images} images; {analysis.tokens} tokens", fontsize=8, color="0.4"
    )
    figure.savefig(path)


def _heat_map(figure: Any, similarity: Tensor, label: str) -> None:
    axes = figure.subplots()
    depth = len(similarity)
    values = similarity.numpy()
    off_diagonal = values[~(values >= 1)]
    lowest = float(off_diagonal.min()) if off_diagonal.size else 0.0
    image = axes.imshow(values, cmap="viridis", vmin=lowest, vmax=1)
    for i in range(depth if depth <= 16 else 0):
        for j in range(depth):
            dark = values[i, j] < lowest + 0.6 * (1 - lowest)
            text = f"{values[i, j]:.2f}".lstrip("0") if i != j else ""
            colour = "white" if dark else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
    ticks = range(0, depth, 1 if depth <= 16 else 4)
    axes.set_xticks(ticks, [str(i + 1) for i in ticks])
    axes.set_yticks(ticks, [str(i + 1) for i in ticks])
    axes.set_xlabel("layer")
    axes.set_ylabel("layer")
    axes.set_title(label, fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8, label="1 = equal maps")


def _per_layer(axes: Any, values: Tensor, title: str, unit: str) -> None:
    """One dot a head, one line through the means; values is `[L, H]`."""
    depth, heads = values.shape
    found = values.numpy()
    layers = range(1, depth + 1)
    for head in range(heads):
        label = "one head" if head == 0 else None
        axes.scatter(layers, found[:, head], s=14, color=BLUE, alpha=0.45, label=label)
    axes.plot(layers, found.mean(1), color=ORANGE, linewidth=2, label="mean of heads")
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(unit)
    axes.set_ylim(0, 1.08 * found.max())
    axes.set_xticks(range(1, depth + 1, 1 if depth <= 16 else 4))
    _plain(axes)


# --- accuracy against latency ---------------------------------------------------------------


def draw_tradeoff(
    points: Sequence[Mapping[str, Any]],
    path: str | PathLike[str],
    *,
    title: str,
    latency_label: str,
) -> None:
    """Accuracy against latency, one marker a model.

    Args:
        points: mappings with ``name``, ``latency`` (milliseconds), ``accuracy`` (0 to 1), its
            standard ``error``, ``converted`` (bool: which colour) and ``below`` (bool: where the
            name stands).
        path: the picture's file.
        title: put above the picture.
        latency_label: what the horizontal axis shows, with its unit.
    """
    figure = _figure(7.5, 4.6)
    axes = figure.subplots()
    for point in points:
        place = point["latency"], 100 * point["accuracy"]
        colour = ORANGE if point["converted"] else BLUE
        axes.errorbar(
            *place, yerr=100 * point["error"], fmt="o", markersize=9, capsize=4, color=colour
        )
        below = point["below"]
        axes.annotate(
            point["name"],
            place,
            xytext=(9, -7 if below else 7),
            textcoords="offset points",
            va="top" if below else "bottom",
            fontsize=9,
        )
    axes.set_xlim(0, 1.45 * max(point["latency"] for point in points))
    lowest = min(100 * (point["accuracy"] - point["error"]) for point in points)
    axes.set_ylim(max(0, lowest - 1), None)
    axes.set_xlabel(latency_label)
    axes.set_ylabel("test accuracy, %")
    axes.set_title(title, fontsize=11)
    _plain(axes)
    figure.savefig(path)


# --- attention on one image -----------------------------------------------------------------


def draw_attention(
    image: Tensor,
    rows: Mapping[str, tuple[str, Sequence[Tensor]]],
    path: str | PathLike[str],
    *,
    title: str,
) -> None:
    """What the image's tokens attend to in each layer, one row of pictures a model.

    Args:
        image: `[h, w]` grey values or `[h, w, 3]`.
        rows: for each model, its letters (one a layer) and one `[h', w']` map a layer: the
            attention that each patch receives.
        path: the picture's file.
        title: put above the picture.
    """
    depth = max(len(maps) for _, maps in rows.values())
    figure = _figure(1.15 * (depth + 1.6), 1.5 * len(rows) + 0.7)
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(len(rows), depth + 1, squeeze=False)
    for line, (name, (letters, maps)) in zip(grid, rows.items(), strict=True):
        line[0].imshow(image.numpy(), cmap="gray_r")
        line[0].set_ylabel(name, fontsize=9)
        line[0].set_title("image", fontsize=8)
        for layer, (axes, letter, received) in enumerate(
            zip(line[1:], letters, maps, strict=True), 1
        ):
            axes.imshow(received.numpy(), cmap="viridis")
            kind = {"A": "attends", "S": "shares"}[letter]
            h, w = received.shape
            axes.set_title(f"{layer}: {kind}\n{h} x {w}", fontsize=8)
        for axes in line:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_color("0.7")
    figure.savefig(path)


# --- training curves ------------------------------------------------------------------------


def draw_curves(
    epochs: Sequence[float],
    curves: Mapping[str, Sequence[Sequence[float]]],
    path: str | PathLike[str],
    *,
    title: str,
    labels: tuple[str, str] = ("epoch", "test accuracy, %"),
) -> None:
    """Accuracy over the epochs: the mean over the seeds, a band from worst to best.

    Args:
        epochs: at which it was measured.
        curves: by name, one list of accuracies (0 to 1) a seed.
        path: the picture's file.
        title: put above the picture.
        labels: of both axes.
    """
    figure = _figure(8.5, 5)
    axes = figure.subplots()
    for i, (name, seeds) in enumerate(curves.items()):
        values = [[100 * v for v in at] for at in zip(*seeds, strict=True)]
        style = "-" if i < 6 else "--"  # more than six colours are hard to tell apart
        means = [sum(at) / len(at) for at in values]
        (line,) = axes.plot(epochs, means, style, label=name, linewidth=2)
        lowest, highest = [min(at) for at in values], [max(at) for at in values]
        axes.fill_between(epochs, lowest, highest, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_title(title, fontsize=11)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _plain(axes)
    figure.savefig(path)


def draw_training(
    history: Sequence[Mapping[str, Any]], path: str | PathLike[str], *, title: str
) -> None:
    """Loss and test accuracy of one run, over its epochs.

    Args:
        history: one mapping an epoch with ``epoch``, ``loss``, ``accuracy`` (0 to 1) and, if
            weights were averaged, ``ema_accuracy``.
        path: the picture's file.
        title: put above the picture.
    """
    figure = _figure(9, 3.6)
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    mark = "o" if len(history) == 1 else ""
    left.plot(epochs, [row["loss"] for row in history], color=BLUE, marker=mark)
    left.set_ylabel("training loss")
    names = {"accuracy": ("weights", BLUE), "ema_accuracy": ("averaged weights", ORANGE)}
    for key, (label, colour) in names.items():
        if key in history[0]:
            values = [100 * row[key] for row in history]
            right.plot(epochs, values, color=colour, marker=mark, label=label)
    right.set_ylabel("test accuracy, %")
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        _plain(axes)
    figure.savefig(path)


# --- search ---------------------------------------------------------------------------------


def draw_search(results: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Accuracy against cost of everything that a search evaluated, and the front.

    Args:
        results: of ``psvit.search.run.Search``.
        path: the picture's file.
    """
    figure = _figure(7.5, 4.6)
    axes = figure.subplots()
    key, unit, label = ("flops", 1e6, "FLOPs of one image, millions")
    if results["measure"] == "latency":
        key, unit, label = ("latency_ms", 1, "latency, ms, sum of measured parts")
    marks = {"evolution": ("o", BLUE), "random": ("x", "0.5")}
    for name, rows in results["evaluated"].items():
        mark, colour = marks[name]
        costs = [row[key] / unit for row in rows]
        accuracies = [100 * row["accuracy"] for row in rows]
        axes.scatter(costs, accuracies, s=16, marker=mark, color=colour, alpha=0.6, label=name)
    costs = [row[key] / unit for row in results["front"]]
    accuracies = [100 * row["accuracy"] for row in results["front"]]
    axes.step(costs, accuracies, where="post", color=ORANGE, linewidth=2, label="front")
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy with the supernet's weights, %")
    axes.set_title(f"{results['held_out_images']} held-out training images", fontsize=11)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    _plain(axes)
    figure.savefig(path)


# --- plans ----------------------------------------------------------------------------------


def draw_plan(found: Mapping[str, Any], path: str | PathLike[str], *, title: str) -> None:
    """What schedules lose at what cost: the predicted front, and what was measured of some.

    Args:
        found: of a ``Plan``.
        path: the picture's file.
        title: put above the picture.
    """
    figure = _figure(7.5, 4.6)
    axes = figure.subplots()
    front = found["front"]
    costs, losses = ([row[key] for row in front] for key in ("cost", "predicted_error"))
    axes.step(costs, losses, where="pre", color=BLUE, linewidth=2, label="front, predicted")
    tried = found["tried"]
    costs, losses = [row["cost"] for row in tried], [row["error"] for row in tried]
    axes.scatter(costs, losses, s=30, marker="x", color="0.3", zorder=3, label="measured")
    axes.scatter(
        found["cost"], found["measured"]["error"], s=60, color=ORANGE, zorder=4, label="chosen"
    )
    what = "latency" if found["budget"].startswith("latency") else "FLOPs"
    axes.set_xlabel(f"{what}, part of the original's")
    axes.set_ylabel("squared error of the scores, relative")
    axes.set_title(title, fontsize=11)
    axes.legend(fontsize=8, frameon=False)
    _plain(axes)
    figure.savefig(path)


# --- merged tokens --------------------------------------------------------------------------


def draw_merges(
    image: Tensor, layers: Sequence[Tensor], path: str | PathLike[str], *, title: str
) -> None:
    """Which patches have become one token, layer by layer.

    Args:
        image: `(3, H, W)` or `(1, H, W)`, 0 to 1.
        layers: for each layer the token that every patch is a part of, `(h, w)`.
        path: the picture's file.
        title: put above the picture.
    """
    columns = min(len(layers) + 1, 5)
    rows = -(-(len(layers) + 1) // columns)
    figure = _figure(2.2 * columns, 2.4 * rows)
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.axis("off")
    panels[0].imshow(_pixels(image))
    panels[0].set_title("image", fontsize=8)
    for number, (axes, into) in enumerate(zip(panels[1:], layers, strict=False), 1):
        axes.imshow(_pixels(_joined(image, into)))
        axes.set_title(f"layer {number}: {len(into.unique())} tokens", fontsize=8)
    figure.savefig(path)


def _pixels(image: Tensor) -> Any:
    return image.expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1).numpy()


def _joined(image: Tensor, into: Tensor) -> Tensor:
    """Each token's patches in their mean colour, white lines between tokens."""
    scale = [size // count for size, count in zip(image.shape[1:], into.shape, strict=True)]
    token = into.repeat_interleave(scale[0], 0).repeat_interleave(scale[1], 1)
    image = image[:, : token.shape[0], : token.shape[1]].clone()
    count = int(into.max()) + 1
    sums = image.new_zeros(len(image), count).index_add_(1, token.flatten(), image.flatten(1))
    means = sums / token.flatten().bincount(minlength=count).clamp(min=1)
    image = means[:, token.flatten()].view_as(image)
    image[:, 1:][:, token[1:] != token[:-1]] = 1
    image[:, :, 1:][:, token[:, 1:] != token[:, :-1]] = 1
    return image
