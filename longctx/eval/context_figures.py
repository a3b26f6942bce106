"""Figures of the tasks that read contexts; drawn like those of `figures.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longctx.eval.config_contexts import PLACES
from longctx.eval.figures import (
    SIZE,
    Results,
    legend,
    look,
    new_axes,
    protocols_of,
    result_of,
    save,
)

DASHES = {"own": "-", "other": ":", "contexts": "-", "replug": ":"}
SETTING_DASHES = {"retrieved": "-", "first": "--", "middle": "-.", "last": ":", "no_gold": "-"}


def _perplexity_by(
    models: Sequence[Results], parts: Sequence[Sequence[dict[str, Any]]], key: str, names: Any
) -> tuple[Any, Any]:
    """Perplexity against context tokens, a colour per model and a dash per kind of row."""
    figure, axes = new_axes(*SIZE)
    ticks: set[int] = set()
    for i, (model, rows) in enumerate(zip(models, parts, strict=True)):
        for kind, name in names.items():
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
                linestyle=DASHES[kind],
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


def contexts_figure(models: Sequence[Results], protocol: str, path: Path) -> str:
    """Perplexity against tokens of context, own and of another document.

    Args:
        models: contents of `results.json` that hold the protocol.
        protocol: its name.
        path: PNG to write.

    Returns:
        The file's name.
    """
    parts = [protocols_of(m, "contexts")[protocol]["rows"] for m in models]
    names = {"own": "context right before it", "other": "context of another document"}
    figure, axes = _perplexity_by(models, parts, "context", names)
    axes.set_xlabel("context before the decoder's window, tokens")
    axes.set_title(f"Perplexity behind contexts, protocol {protocol}", fontsize=11)
    legend(figure)
    return save(figure, path)


def retrieval_figure(models: Sequence[Results], path: Path) -> str:
    """Perplexity against tokens of retrieved passages, with RePlug.

    Args:
        models: contents of `results.json` that hold the task.
        path: PNG to write.

    Returns:
        The file's name.
    """
    parts = [(result_of(m, "retrieval_perplexity") or {})["rows"] for m in models]
    names = {"contexts": "all passages in one pass", "replug": "RePlug"}
    figure, axes = _perplexity_by(models, parts, "method", names)
    axes.set_xlabel("retrieved passages, tokens")
    axes.set_title("Perplexity with retrieved passages", fontsize=11)
    legend(figure)
    return save(figure, path)


def qa_figure(models: Sequence[Results], path: Path) -> str:
    """Exact match against k; a colour per model, a dash per setting, level lines for gold only.

    Args:
        models: contents of `results.json` that hold the task.
        path: PNG to write.

    Returns:
        The file's name.
    """
    figure, axes = new_axes(*SIZE)
    ticks: set[int] = set()
    for i, model in enumerate(models):
        own, cells = look(model, i), (result_of(model, "qa") or {})["cells"]
        for setting, dashes in SETTING_DASHES.items():
            line = sorted((c for c in cells if c["setting"] == setting), key=lambda c: int(c["k"]))
            if not line:
                continue
            em = [100 * c["em"] for c in line]
            ends = [[100 * x for x in c["em_interval"]] for c in line]
            below = [y - low for y, (low, _) in zip(em, ends, strict=True)]
            above = [high - y for y, (_, high) in zip(em, ends, strict=True)]
            axes.errorbar(
                [c["k"] for c in line],
                em,
                yerr=[below, above],
                label=f"{model['label']}, {_named(setting)}",
                **own,
                alpha=0.45 if setting == "no_gold" else 1.0,
                linestyle=dashes,
                markersize=4,
                linewidth=1.4,
                capsize=2,
            )
            ticks |= {c["k"] for c in line}
        for cell in (c for c in cells if c["setting"] == "gold_only"):
            name = f"{model['label']}, gold only"
            axes.axhline(100 * cell["em"], color=own["color"], linewidth=0.8, label=name)
    axes.set_xticks(sorted(ticks), [f"{k:,}" for k in sorted(ticks)])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("passages, k")
    axes.set_ylabel("exact match, %")
    axes.set_title("Questions over k passages, with 95% intervals", fontsize=11)
    legend(figure)
    return save(figure, path)


def _named(setting: str) -> str:
    return f"gold {setting}" if setting in PLACES else setting.replace("_", " ")
