"""The first table of a report: one row a model, the main numbers of each task.

A number that depends on the length is given twice: at the longest length inside every model's
native window, where an extension may cost something, and at the longest of all, where it must gain;
at every length where few tasks and lengths were measured. A mean over lengths would let a base that
is lost beyond its window win by what it does inside it.
The best of a column is bold, with all values that their 95% intervals cannot separate from it, if
all models were measured in the same way; a value that was not is marked. Costs nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import hypot
from typing import Any

from longctx.eval.answers import wilson
from longctx.eval.results import Results, result_of, tasks_of, unlike
from longctx.eval.tables import table

Value = tuple[float, float]
Z = 1.96
MARK = " †"
FEW_TASKS, FEW_LENGTHS = 2, 5  # no more than these: a column for every length


@dataclass(frozen=True)
class Column:
    """One number of each model.

    Args:
        name: what it is, with its unit.
        values: (value, half its 95% interval) of each model; None where it has none.
        text: how a value is written.
        rising: more is better.
        ranked: False: how far its values are from chance is not known, so none is called the best.
    """

    name: str
    values: Sequence[Value | None]
    text: Callable[[float], str]
    rising: bool = True
    ranked: bool = True


def count(value: float) -> str:
    """A whole number."""
    return f"{value:,.0f}"


def nats(value: float) -> str:
    """A loss."""
    return f"{value:.3f}"


def bounded(row: dict[str, Any], key: str) -> Value:
    """A value of a row, and half its interval (`KEY_interval`, or `interval`)."""
    low, high = row[f"{key}_interval"] if f"{key}_interval" in row else row["interval"]
    return row[key], (high - low) / 2


def gain(row: dict[str, Any]) -> Value | None:
    """The fall of the loss of a row against the same tokens without context, nats."""
    if row.get("gain") is None:
        return None
    return row["gain"], Z * (row["gain_se"] or 0)


def certain(values: Sequence[float | None]) -> list[Value | None]:
    """Values that have no interval."""
    return [None if v is None else (v, 0.0) for v in values]


def shared(rows: Sequence[Mapping[int, Any]]) -> list[int]:
    """The numbers that all models with any have in common, rising."""
    found = [set(r) for r in rows if r]
    return sorted(set.intersection(*found)) if found else []


def cells_of(model: Results, task: str, key: str = "cells") -> list[dict[str, Any]]:
    """The rows of a task's result; none where the model lacks it."""
    return list((result_of(model, task) or {key: []})[key])


def share(right: int, asked: int) -> Value:
    """A share of right answers, and half its Wilson interval."""
    low, high = wilson(right, asked)
    return right / asked, (high - low) / 2


def mean(values: Sequence[Value]) -> Value:
    """The mean of independent values."""
    return sum(v for v, _ in values) / len(values), hypot(*(half for _, half in values)) / len(
        values
    )


def at_lengths(
    models: Sequence[Results],
    rows: Sequence[Mapping[int, Value]],
    title: str,
    text: Callable[[float], str],
    *,
    rising: bool = True,
    ranked: bool = True,
) -> Iterator[Column]:
    """A column inside the native window and one at the longest length that all share.

    A column for every shared length where both tasks and lengths are few.

    Args:
        models: of the report.
        rows: for each of them length, tokens -> value; empty where it lacks the task.
        title: `{at}` in it becomes the length and where that is.
        text: how a value is written.
        rising: more is better.
        ranked: False: none is called the best.
    """
    lengths = shared(rows)
    native = [int(m["native_window"]) for m, row in zip(models, rows, strict=True) if row]
    inside = [n for n in lengths if n <= min(native)]
    few = len(tasks_of(models)) <= FEW_TASKS and len(lengths) <= FEW_LENGTHS
    for length in lengths if few else dict.fromkeys([*inside[-1:], *lengths[-1:]]):
        at = f"{length:,}"
        if inside[-1:] == [length]:
            at += " (inside the window)"
        elif len(set(native)) == 1:
            at += f" ({length / native[0]:.3g} x the window)"
        values = [row.get(length) for row in rows]
        yield Column(title.format(at=at), values, text, rising, ranked)


def _cells(column: Column, odd: Sequence[bool]) -> list[str]:
    """The texts of a column, the best bold if all were measured alike and some are worse."""
    values = [v for v in column.values if v is not None]
    top, margin = max(values) if column.rising else min(values)

    def best(value: Value) -> bool:
        return abs(value[0] - top) <= hypot(value[1], margin)

    clear = column.ranked and not any(odd) and not all(map(best, values))
    texts = []
    for value, strange in zip(column.values, odd, strict=True):
        if value is None:
            texts.append("")
            continue
        text = column.text(value[0]) + (f" ± {column.text(value[1])}" if value[1] else "")
        texts.append(f"**{text}**" if clear and best(value) else text + MARK * strange)
    return texts


def _trained(models: Sequence[Results]) -> list[tuple[str, list[str]]]:
    """The column of tokens that longctx trained each model on; none where no run is known."""
    runs = [m.get("trained") for m in models]
    if not any(runs):
        return []
    starts = {run["start"] for run in runs if run}
    cells = [
        count(run["tokens"]) if run else "0" if m["model"] in starts else "-"
        for m, run in zip(models, runs, strict=True)
    ]
    return [("trained on, tokens", cells)]


def section(
    models: Sequence[Results],
    columns: Mapping[str, Sequence[Column]],
    compared_by: Mapping[str, Sequence[str]],
) -> Iterator[str]:
    """The lines of the table; none without results.

    Args:
        models: of the report, in the order of the rows.
        columns: of each task.
        compared_by: facts of a model that must be equal for its numbers in a task to compare.
    """
    shown: list[tuple[str, list[str]]] = []
    for task, own in columns.items():
        odd = unlike(models, task, compared_by[task])
        found = [c for c in own if any(value is not None for value in c.values)]
        shown += [(column.name, _cells(column, odd)) for column in found]
    if not shown:
        return
    yield from ("## In short", "")
    if len(models) > 1:
        yield (
            "Bold: the best of a column and every value that 95% intervals do not separate from it "
            "(unpaired, so cautious), if all models were measured in the same way and some are "
            "worse. k_max, effective lengths and times have no interval, so none is bold."
        )
    if any(MARK in cell for _, cells in shown for cell in cells):
        yield f"{MARK.strip()}: measured under other settings than the model in the first row."
    yield (
        "± is half a 95% interval; how each number was measured is said above its table below. "
        "The window: the models' native one, before any extension."
    )
    if trained := _trained(models):
        yield (
            "Trained on: tokens of the runs recorded beside the model; 0: what such a run started "
            "from; -: no record."
        )
    yield ""
    shown = trained + shown
    rows = [[m["label"], *(cells[i] for _, cells in shown)] for i, m in enumerate(models)]
    yield from table(["model", *(name for name, _ in shown)], rows)
