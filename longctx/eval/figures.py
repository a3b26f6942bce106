"""Figures of an evaluation: perplexity against length, needle heat maps, k_max.

Drawn without a display, as PNG and as SVG; a few hundred milliseconds each. Colours are readable
to colour-blind eyes (Okabe-Ito lines, viridis maps), on white and on black.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"
GREY = "#808080"
SIZE = (5.6, 3.7)  # inches: letters can be read where it is as narrow as a phone
DODGE = 0.03  # octaves between the points of two models, so that error bars stand side by side
LOG_FROM = 10  # a log y axis above this ratio of largest to smallest perplexity
CLIP_FROM = 100  # above this ratio perplexities are drawn at the edge, with an arrow

Results = dict[str, Any]


def look(model: Results, i: int) -> dict[str, Any]:
    """Colour and marker of a model, alike in all figures of a report (`place`: its row there)."""
    i = model.get("place", i)
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def result_of(results: Results, task: str) -> dict[str, Any] | None:
    """A task's result in one `results.json`, if it is there."""
    entry = results["tasks"].get(task)
    return None if entry is None else entry["result"]


def protocols_of(results: Results, task: str = "perplexity") -> dict[str, Any]:
    """A task's results by protocol name."""
    result = result_of(results, task)
    return {} if result is None else result["protocols"]


def save(figure: Figure, path: Path) -> str:
    """Writes a PNG, and an SVG without background beside it; the PNG's name."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)
    with rc_context({"svg.hashsalt": path.stem}):  # equal results, equal files
        drawing = path.with_suffix(".svg")
        figure.savefig(drawing, transparent=True, metadata={"Date": None, "Creator": None})
    return path.name


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of so many inches in the style of all."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(True, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend(figure: Figure) -> None:
    """What the lines are, below the axes, where it hides nothing."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    widest = max(map(len, labels))
    columns = max(1, min(3, int(15.5 * figure.get_figwidth()) // (widest + 8)))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )


def _length_axis(axes: Axes, lengths: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.tick_params(axis="x", which="minor", bottom=False)
    if len(lengths) > 8:
        axes.tick_params(axis="x", labelrotation=45)
    axes.set_xlabel(label)


def _window_lines(axes: Axes, models: Sequence[Results]) -> None:
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


def _curve(results: Results, protocol: str) -> list[tuple[int, float, float]]:
    """(length, perplexity, its standard error) of one model under one protocol."""
    rows = protocols_of(results)[protocol]["rows"]
    if protocol == "single_pass_buckets":
        longest = max(rows, key=lambda row: int(row["length"]))
        return [(b["end"], b["perplexity"], b["perplexity_se"] or 0) for b in longest["buckets"]]
    return [(r["length"], r["perplexity"], r["perplexity_se"] or 0) for r in rows]


def perplexity_figure(models: Sequence[Results], protocol: str, path: Path) -> str:
    """Perplexity against context length (or position), a line per model.

    Args:
        models: contents of `results.json`, those that lack the protocol are left out.
        protocol: its name, printed in the title.
        path: PNG to write.

    Returns:
        The file's name.
    """
    figure, axes = new_axes(*SIZE)
    curves = [_curve(m, protocol) if protocol in protocols_of(m) else [] for m in models]
    values = [y for curve in curves for _, y, _ in curve]
    limit = CLIP_FROM * min(values)
    for i, model in enumerate(models):
        if not curves[i]:
            continue
        lengths, perplexity, error = zip(*sorted(curves[i]), strict=True)
        shown = [min(y, limit) for y in perplexity]
        beside = 2 ** (DODGE * (i - (len(models) - 1) / 2))
        axes.errorbar(
            [x * beside for x in lengths],
            shown,
            yerr=[e if y <= limit else 0 for y, e in zip(perplexity, error, strict=True)],
            label=model["label"],
            **look(model, i),
            markersize=5,
            linewidth=1.6,
            capsize=2,
        )
        _arrows(
            axes,
            [x * beside for x, y in zip(lengths, perplexity, strict=True) if y > limit],
            limit,
            look(model, i)["color"],
        )
    if max(values) > limit:
        axes.plot([], [], "k^", markerfacecolor="none", label=f"clipped, above {limit:,.0f}")
    _window_lines(axes, [m for m in models if protocol in protocols_of(m)])
    by_position = protocol == "single_pass_buckets"
    _length_axis(
        axes,
        sorted({x for curve in curves for x, _, _ in curve}),
        "position (end of bucket), tokens" if by_position else "context, tokens",
    )
    if max(values) > LOG_FROM * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}")
    axes.set_ylabel("perplexity")
    axes.set_title(f"Perplexity, protocol {protocol}", fontsize=11)
    legend(figure)
    return save(figure, path)


def _arrows(axes: Axes, lengths: Sequence[float], limit: float, colour: str) -> None:
    """Marks values that were clipped."""
    for x in lengths:
        axes.plot(x, limit, "^", markersize=11, markerfacecolor="none", markeredgecolor=colour)


def efficiency_figure(models: Sequence[Results], path: Path) -> str:
    """Prefill time, time of a decoded token and cache against the prompt's length.

    Args:
        models: contents of `results.json` that hold the task.
        path: PNG to write.

    Returns:
        The file's name.
    """
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    shown = (
        ("prefill_seconds", "prefill, s", 1.0),
        ("decode_seconds", "decode, ms a token", 1e3),
        ("cache_bytes", "cache, MiB", 2**-20),
    )
    for axes, (key, name, factor) in zip(figure.subplots(1, 3), shown, strict=True):
        for i, model in enumerate(models):
            rows = (result_of(model, "efficiency") or {})["rows"]
            axes.plot(
                [r["length"] for r in rows],
                [factor * r[key] for r in rows],
                label=model["label"],
                **look(model, i),
                markersize=4,
            )
        lengths = {r["length"] for m in models for r in (result_of(m, "efficiency") or {})["rows"]}
        _length_axis(axes, sorted(lengths), "prompt, tokens")
        axes.set_ylim(0, 1.08 * axes.dataLim.y1 or 1)
        axes.set_title(name, fontsize=10)
        axes.grid(True, alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    legend(figure)
    return save(figure, path)


def k_max_figure(models: Sequence[Results], path: Path) -> str:
    """Success against the distance of the key, a line per model, k_max in the legend.

    Args:
        models: contents of `results.json` that hold the task.
        path: PNG to write.

    Returns:
        The file's name.
    """
    figure, axes = new_axes(*SIZE)
    for i, model in enumerate(models):
        result = result_of(model, "k_max") or {}
        axes.plot(
            [c["k"] for c in result["cells"]],
            [100 * c["rate"] for c in result["cells"]],
            label=f"{model['label']}: k_max {result['k_max']:,} of {result['target']:,}",
            **look(model, i),
            markersize=4,
            linewidth=1.4,
        )
    for threshold in {model["tasks"]["k_max"]["settings"]["threshold"] for model in models}:
        axes.axhline(100 * threshold, color=GREY, linewidth=1, label="threshold")
    _window_lines(axes, models)
    axes.set_ylim(-4, 104)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_xlabel("distance from the key to the end, tokens")
    axes.set_ylabel("keys retrieved, %")
    axes.set_title("Passkey by distance", fontsize=11)
    legend(figure)
    return save(figure, path)
