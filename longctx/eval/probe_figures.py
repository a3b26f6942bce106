"""Figures of RULER, the needle map, babi-style facts; drawn like those of `figures.py`."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from longctx.eval.figures import (
    COLOURS,
    MARKERS,
    Results,
    legend,
    new_axes,
    result_of,
    save,
)


def tiles(
    axes: Axes,
    values: dict[tuple[str, int], float],
    rows: Sequence[str],
    columns: Sequence[int],
) -> Any:
    """A heat map of per cent, dark to bright, each value written in its tile.

    Args:
        axes: to draw on.
        values: share by (row, column); a missing one stays white.
        rows: names, from the top.
        columns: lengths, tokens.
    """
    grid = [[100 * values.get((r, c), float("nan")) for c in columns] for r in rows]
    image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for (name, length), value in values.items():
        axes.text(
            columns.index(length),
            rows.index(name),
            f"{100 * value:.0f}",
            ha="center",
            va="center",
            fontsize=8,
            color="#111111" if value > 0.6 else "white",
        )
    axes.set_xticks(range(len(columns)), [f"{n:,}" for n in columns])
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xlabel("prompt length, tokens")
    return image


def _windows(axes: Axes, model: Results, lengths: Sequence[int]) -> None:
    """The dotted line ends the native window, the dashed one the extended window."""
    for window, style in {model["window"]: "--", model["native_window"]: ":"}.items():
        inside = sum(length <= window for length in lengths)
        if 0 < inside < len(lengths):
            axes.axvline(inside - 0.5, color="white", linewidth=3.5)
            axes.axvline(inside - 0.5, color="#D55E00", linestyle=style, linewidth=2)


def _panels(models: Sequence[Results], height: float) -> tuple[Figure, list[Axes]]:
    columns = 1 if len(models) == 1 else 2
    rows = ceil(len(models) / columns)
    figure = Figure(figsize=(5.4 * columns + 0.8, height * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for axes in grid[len(models) :]:
        axes.set_visible(False)
    return figure, grid


def ruler_figure(models: Sequence[Results], path: Path) -> str:
    """A heat map per model: task x length, the average at the bottom, per cent.

    Args:
        models: contents of `results.json` that hold the task.
        path: PNG to write.

    Returns:
        The file's name.
    """
    figure, grid = _panels(models, 4.6)
    for axes, model in zip(grid, models, strict=False):
        result = result_of(model, "ruler") or {}
        values = {(c["task"], c["length"]): c["score"] for c in result["cells"]}
        values |= {("average", a["length"]): a["score"] for a in result["averages"]}
        lengths = sorted(a["length"] for a in result["averages"])
        rows = [*dict.fromkeys(c["task"] for c in result["cells"]), "average"]
        image = tiles(axes, values, rows, lengths)
        axes.axhline(len(rows) - 1.5, color="white", linewidth=3)
        _windows(axes, model, lengths)
        reached = result["effective_length"]
        axes.set_title(
            f"{model['label']}: effective length {reached:,}"
            if reached
            else f"{model['label']}: no tested length is effective",
            fontsize=10,
        )
    figure.colorbar(image, ax=grid, shrink=0.85).set_label("RULER score, %")
    return save(figure, path)


def needle_figure(models: Sequence[Results], path: Path) -> str:
    """A heat map per model: depth of the fact x prompt length, per cent found.

    Args:
        models: contents of `results.json` that hold the task.
        path: PNG to write.

    Returns:
        The file's name.
    """
    figure, grid = _panels(models, 3.3)
    for axes, model in zip(grid, models, strict=False):
        result = result_of(model, "needle") or {}
        values = {(f"{100 * c['depth']:.0f}", c["length"]): c["rate"] for c in result["cells"]}
        lengths = sorted({c["length"] for c in result["cells"]})
        depths = [f"{100 * d:.0f}" for d in sorted({c["depth"] for c in result["cells"]})]
        image = tiles(axes, values, depths, lengths)
        _windows(axes, model, lengths)
        axes.set_ylabel("depth of the fact, %")
        axes.set_title(f"{model['label']}: mean {100 * result['mean']:.1f} %", fontsize=10)
    figure.colorbar(image, ax=grid, shrink=0.85).set_label("facts found, %")
    return save(figure, path)


def babi_figure(models: Sequence[Results], path: Path) -> str:
    """Right answers against length: a colour per model, a dash per number of hops.

    Args:
        models: contents of `results.json` that hold the task.
        path: PNG to write.

    Returns:
        The file's name.
    """
    figure, axes = new_axes(7.0, 4.2)
    ticks: set[int] = set()
    for i, model in enumerate(models):
        cells = (result_of(model, "babi") or {})["cells"]
        for hops, dashes in {1: "-", 2: "--", 3: ":"}.items():
            line = sorted((c for c in cells if c["hops"] == hops), key=lambda c: int(c["length"]))
            if not line:
                continue
            score = [100 * c["score"] for c in line]
            low = [s - 100 * c["interval"][0] for s, c in zip(score, line, strict=True)]
            high = [100 * c["interval"][1] - s for s, c in zip(score, line, strict=True)]
            axes.errorbar(
                [c["length"] for c in line],
                score,
                yerr=[low, high],
                label=f"{model['label']}, {hops} supporting fact{'s' if hops > 1 else ''}",
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                linestyle=dashes,
                markersize=4,
                linewidth=1.4,
                capsize=2,
            )
            ticks |= {c["length"] for c in line}
    guess = 100 * (result_of(models[0], "babi") or {})["guessing"]
    axes.axhline(guess, color="#808080", linewidth=0.8, label="guessing")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [f"{n:,}" for n in sorted(ticks)])
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.set_ylim(-4, 104)
    axes.set_xlabel("prompt length, tokens")
    axes.set_ylabel("right, %")
    axes.set_title("Babi-style questions, with 95% intervals", fontsize=11)
    legend(figure)
    return save(figure, path)
