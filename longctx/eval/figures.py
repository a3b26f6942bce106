"""What the figures of an evaluation share: colours, axes of lengths, heat maps, files.

Drawn without a display, as PNG and as SVG; a few hundred milliseconds each. Colours are readable
to colour-blind eyes (Okabe-Ito lines, viridis maps), on white and on black. matplotlib is imported
by the first figure.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from longctx.eval.results import Results, result_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"
GREY = "#808080"
SIZE = (5.6, 3.7)  # inches: letters can be read where it is as narrow as a phone
WINDOWS = "dotted: the native window ends; dashed: the extended one"


def look(model: Results, i: int) -> dict[str, Any]:
    """Colour and marker of a model, the same in all figures of a report (`place`: its row)."""
    i = model.get("place", i)
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def save(figure: "Figure", path: Path) -> str:
    """Writes a PNG, and an SVG without background next to it; returns the PNG's name."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)
    with rc_context({"svg.hashsalt": path.stem}):  # equal results, equal files
        drawing = path.with_suffix(".svg")
        figure.savefig(drawing, transparent=True, metadata={"Date": None, "Creator": None})
    return path.name


def new_axes(width: float, height: float) -> "tuple[Figure, Axes]":
    """An empty figure of this size, inches, with one pair of axes."""
    figure, [axes] = new_row(width, height, 1)
    return figure, axes


def new_row(width: float, height: float, count: int) -> "tuple[Figure, list[Axes]]":
    """An empty figure of this size, inches, with axes side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    row = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in row:
        axes.grid(True, alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, row


def legend(figure: "Figure") -> None:
    """What the lines are, below the axes, where it hides nothing."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    widest = max(map(len, labels))
    columns = max(1, min(3, int(15.5 * figure.get_figwidth()) // (widest + 8)))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )


def length_axis(axes: "Axes", lengths: Sequence[int], label: str) -> None:
    """A logarithmic x axis with a tick at each of `lengths`."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.tick_params(axis="x", which="minor", bottom=False)
    if len(lengths) > 8:
        axes.tick_params(axis="x", labelrotation=45)
    axes.set_xlabel(label)


def window_lines(axes: "Axes", models: Sequence[Results]) -> None:
    """Dotted grey at native windows, dashed where a model's extended window ends."""
    for native in sorted({m["native_window"] for m in models}):
        axes.axvline(native, color=GREY, linestyle=":", label=f"native window {native:,}")
    extended = {m["window"] for m in models} - {m["native_window"] for m in models}
    for window in sorted(extended):
        owners = [i for i, m in enumerate(models) if m["window"] == window]
        colour = look(models[owners[0]], owners[0])["color"] if len(owners) == 1 else GREY
        axes.axvline(
            window, color=colour, linestyle="--", linewidth=1, label=f"extended window {window:,}"
        )


def tiles(
    axes: "Axes",
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


def mark_windows(axes: "Axes", model: Results, lengths: Sequence[int]) -> None:
    """The dotted line ends the native window, the dashed one the extended window."""
    for window, style in {model["window"]: "--", model["native_window"]: ":"}.items():
        inside = sum(length <= window for length in lengths)
        if 0 < inside < len(lengths):
            axes.axvline(inside - 0.5, color="white", linewidth=3.5)
            axes.axvline(inside - 0.5, color="#D55E00", linestyle=style, linewidth=2)


def panels(models: Sequence[Results], columns: int, height: float) -> "tuple[Figure, list[Axes]]":
    """Axes for each model, two in a row, wide enough for this many columns."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    across = 1 if len(models) == 1 else 2
    rows = ceil(len(models) / across)
    width = max(3.0, 0.55 * columns + 1.2)
    figure = Figure(figsize=(width * across + 0.9, height * rows))
    figure.set_layout_engine(ConstrainedLayoutEngine(h_pad=0.1))
    grid = list(figure.subplots(rows, across, squeeze=False).flatten())
    for axes in grid[len(models) :]:
        axes.set_visible(False)
    return figure, grid


def colour_scale(figure: "Figure", grid: "Sequence[Axes]", image: Any, label: str) -> None:
    """What the colours of the heat maps mean."""
    tall = ceil(len(grid) / 2)
    figure.colorbar(image, ax=list(grid), shrink=0.85, aspect=20 * tall).set_label(label)


def panel_title(axes: "Axes", model: Results, text: str) -> None:
    """The model's name and a few words above its axes."""
    columns = len(axes.get_xticks())
    axes.set_title(fill(f"{model['label']}: {text}", max(32, 8 * columns)), fontsize=10)


def depth_maps(models: Sequence[Results], task: str, asked: str, path: Path) -> str:
    """A heat map per model: depth x prompt length, per cent found.

    Args:
        models: contents of `results.json` that hold the task.
        task: its name; cells with `length`, `depth` and `rate`.
        asked: what is looked for, one word.
        path: PNG to write.

    Returns:
        The file's name.
    """
    found = [result_of(model, task) or {} for model in models]
    widest = max(len({c["length"] for c in r["cells"]}) for r in found)
    figure, grid = panels(models, widest, 3.2)
    for axes, model, result in zip(grid, models, found, strict=False):
        values = {(f"{100 * c['depth']:g}", c["length"]): c["rate"] for c in result["cells"]}
        lengths = sorted({c["length"] for c in result["cells"]})
        depths = [f"{100 * d:g}" for d in sorted({c["depth"] for c in result["cells"]})]
        image = tiles(axes, values, depths, lengths)
        mark_windows(axes, model, lengths)
        axes.set_ylabel(f"depth of the {asked}, %")
        panel_title(axes, model, f"mean {100 * result['mean']:.1f} %")
    colour_scale(figure, grid, image, f"{asked}s found, %")
    return save(figure, path)


def perplexity_by(
    models: Sequence[Results],
    parts: Sequence[Sequence[dict[str, Any]]],
    key: str,
    kinds: Mapping[str, tuple[str, str]],
) -> "tuple[Figure, Axes]":
    """Perplexity against context tokens, a colour per model and a dash per kind of row.

    Args:
        models: contents of `results.json` that hold the task.
        parts: the rows of each.
        key: which field of a row is its kind; `none` belongs to every line.
        kinds: of each kind its name in the legend, and its dashes.
    """
    figure, axes = new_axes(*SIZE)
    ticks: set[int] = set()
    for i, (model, rows) in enumerate(zip(models, parts, strict=True)):
        for kind, (name, dashes) in kinds.items():
            line = [r for r in rows if r[key] in (kind, "none")]
            if all(r[key] == "none" for r in line):
                continue
            line.sort(key=lambda r: int(r["context_tokens"]))
            axes.errorbar(
                [r["context_tokens"] for r in line],
                [r["perplexity"] for r in line],
                yerr=[r["perplexity_se"] or 0 for r in line],
                label=f"{model['label']}, {name}",
                **look(model, i),
                linestyle=dashes,
                markersize=5,
                linewidth=1.6,
                capsize=2,
            )
            ticks |= {r["context_tokens"] for r in line}
    least = min((t for t in ticks if t), default=1)
    axes.set_xscale("symlog", base=2, linthresh=least, linscale=0.5)
    axes.set_xticks(sorted(ticks), [f"{n:,}" for n in sorted(ticks)])
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.set_ylabel("perplexity")
    return figure, axes
