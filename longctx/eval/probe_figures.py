"""Figures of RULER, passkey and needle maps, babi-style facts; drawn like those of `figures.py`."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from longctx.eval.figures import (
    SIZE,
    Results,
    legend,
    look,
    new_axes,
    result_of,
    save,
)
from longctx.eval.ruler_length import effective

NO_LENGTH = "too few samples for an effective length"
WINDOWS = "dotted: the native window ends; dashed: the extended one"


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


def _panels(models: Sequence[Results], columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """Axes of one model each, two beside each other, wide enough for so many columns."""
    across = 1 if len(models) == 1 else 2
    rows = ceil(len(models) / across)
    width = max(3.0, 0.55 * columns + 1.2)
    figure = Figure(figsize=(width * across + 0.9, height * rows))
    figure.set_layout_engine(ConstrainedLayoutEngine(h_pad=0.1))
    grid = list(figure.subplots(rows, across, squeeze=False).flatten())
    for axes in grid[len(models) :]:
        axes.set_visible(False)
    return figure, grid


def _scale(figure: Figure, grid: Sequence[Axes], image: Any, label: str) -> None:
    tall = ceil(len(grid) / 2)
    figure.colorbar(image, ax=list(grid), shrink=0.85, aspect=20 * tall).set_label(label)


def _title(axes: Axes, model: Results, text: str) -> None:
    columns = len(axes.get_xticks())
    axes.set_title(fill(f"{model['label']}: {text}", max(32, 8 * columns)), fontsize=10)


def ruler_figure(models: Sequence[Results], path: Path) -> str:
    """A heat map per model: task x length, the average at the bottom, per cent.

    Args:
        models: contents of `results.json` that hold the task.
        path: PNG to write.

    Returns:
        The file's name.
    """
    found = [result_of(model, "ruler") or {} for model in models]
    figure, grid = _panels(models, max(len(r["averages"]) for r in found), 4.6)
    for axes, model, result in zip(grid, models, found, strict=False):
        values = {(c["task"], c["length"]): c["score"] for c in result["cells"]}
        values |= {("average", a["length"]): a["score"] for a in result["averages"]}
        lengths = sorted(a["length"] for a in result["averages"])
        rows = [*dict.fromkeys(c["task"] for c in result["cells"]), "average"]
        image = tiles(axes, values, rows, lengths)
        axes.axhline(len(rows) - 1.5, color="white", linewidth=3)
        _windows(axes, model, lengths)
        told = effective(result)
        _title(axes, model, NO_LENGTH if told is None else f"effective length {told}")
    _scale(figure, grid, image, "RULER score, %")
    return save(figure, path)


def _depth_maps(models: Sequence[Results], task: str, asked: str, path: Path) -> str:
    found = [result_of(model, task) or {} for model in models]
    widest = max(len({c["length"] for c in r["cells"]}) for r in found)
    figure, grid = _panels(models, widest, 3.2)
    for axes, model, result in zip(grid, models, found, strict=False):
        values = {(f"{100 * c['depth']:g}", c["length"]): c["rate"] for c in result["cells"]}
        lengths = sorted({c["length"] for c in result["cells"]})
        depths = [f"{100 * d:g}" for d in sorted({c["depth"] for c in result["cells"]})]
        image = tiles(axes, values, depths, lengths)
        _windows(axes, model, lengths)
        axes.set_ylabel(f"depth of the {asked}, %")
        _title(axes, model, f"mean {100 * result['mean']:.1f} %")
    _scale(figure, grid, image, f"{asked}s found, %")
    return save(figure, path)


def needle_figure(models: Sequence[Results], path: Path) -> str:
    """A heat map per model: depth of the fact x prompt length, per cent found.

    Args:
        models: contents of `results.json` that hold the task.
        path: PNG to write.

    Returns:
        The file's name.
    """
    return _depth_maps(models, "needle", "fact", path)


def passkey_figure(models: Sequence[Results], path: Path) -> str:
    """A heat map per model: depth of the key x prompt length, per cent found.

    Args:
        models: contents of `results.json` that hold the task.
        path: PNG to write.

    Returns:
        The file's name.
    """
    return _depth_maps(models, "passkey", "key", path)


def babi_figure(models: Sequence[Results], path: Path) -> str:
    """Right answers against length: a colour per model, a dash per number of hops.

    Args:
        models: contents of `results.json` that hold the task.
        path: PNG to write.

    Returns:
        The file's name.
    """
    figure, axes = new_axes(*SIZE)
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
                **look(model, i),
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
