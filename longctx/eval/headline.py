"""The first table of a report: one row a model, the main number of each task.

Says which model to ship as far as numbers can: the best of a column is bold, with all that a 95%
interval cannot tell from it, where all were measured alike; what was not is marked. Costs nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import hypot
from typing import Any

from longctx.eval.answers import wilson
from longctx.eval.compare import tasks_of, unlike
from longctx.eval.figures import Results, protocols_of, result_of
from longctx.eval.ruler_length import effective
from longctx.eval.tables import table

Value = tuple[float, float]
Z = 1.96
MARK = " †"
# Of the protocols that ran, the one whose lengths compare best.
PREFERRED = (
    "token_matched",
    "single_pass_buckets",
    "sliding_new_tokens",
    "whole_window",
    "cepe_tail",
)


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


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _interval(row: dict[str, Any], key: str) -> Value:
    low, high = row[f"{key}_interval"] if f"{key}_interval" in row else row["interval"]
    return row[key], (high - low) / 2


def _sure(values: Sequence[float | None]) -> list[Value | None]:
    """Values that have no interval."""
    return [None if v is None else (v, 0.0) for v in values]


def _shared(rows: Sequence[set[int]]) -> int | None:
    """The largest number that all who have any share."""
    found = [r for r in rows if r]
    return max(set.intersection(*found), default=None) if found else None


def _perplexity(models: Sequence[Results]) -> Iterator[Column]:
    names = dict.fromkeys(n for m in models for n in protocols_of(m))
    name = min(names, key=lambda n: (PREFERRED.index(n) if n in PREFERRED else 99, n))
    rows = [
        {
            r["length"]: (r["perplexity"], Z * (r["perplexity_se"] or 0))
            for r in protocols_of(m).get(name, {"rows": []})["rows"]
        }
        for m in models
    ]
    if (length := _shared([set(r) for r in rows])) is not None:
        values = [r.get(length) for r in rows]
        title = f"perplexity at {length:,} (`{name}`)"
        yield Column(title, values, lambda v: f"{v:.2f}", rising=False)


def _mean(task: str, title: str) -> Callable[[Sequence[Results]], Iterator[Column]]:
    def columns(models: Sequence[Results]) -> Iterator[Column]:
        values: list[Value | None] = []
        for m in models:
            cells = (result_of(m, task) or {"cells": []})["cells"]
            prompts = sum(c["samples"] for c in cells)
            right = round(sum(c["rate"] * c["samples"] for c in cells))
            low, high = wilson(right, prompts) if prompts else (0.0, 0.0)
            values.append((right / prompts, (high - low) / 2) if prompts else None)
        yield Column(f"{title}, %, mean of the grid", values, _percent)

    return columns


def _scores(task: str, title: str) -> Callable[[Sequence[Results]], Iterator[Column]]:
    def columns(models: Sequence[Results]) -> Iterator[Column]:
        values: list[Value | None] = []
        known = True
        for m in models:
            cells = (result_of(m, task) or {"cells": []})["cells"]
            known &= all(c["interval"] for c in cells)
            halves = [(c["interval"][1] - c["interval"][0]) / 2 for c in cells if c["interval"]]
            mean = sum(c["score"] for c in cells) / len(cells) if cells else 0.0
            values.append((mean, hypot(*halves) / len(cells)) if cells else None)
        yield Column(title, values, _percent, ranked=known)

    return columns


def _k_max(models: Sequence[Results]) -> Iterator[Column]:
    values = [(result_of(m, "k_max") or {}).get("k_max") for m in models]
    yield Column("k_max, tokens", _sure(values), _count, ranked=False)


def _ruler(models: Sequence[Results]) -> Iterator[Column]:
    found = [result_of(m, "ruler") or {} for m in models]
    rows = [{a["length"]: _interval(a, "score") for a in r.get("averages", [])} for r in found]
    if (length := _shared([set(r) for r in rows])) is not None:
        yield Column(f"RULER at {length:,}, %", [r.get(length) for r in rows], _percent)
    told = [effective(r) if r else None for r in found]
    values = _sure([None if t is None else t.length for t in told])
    yield Column("RULER effective length, tokens", values, _count, ranked=False)


def _gain(row: dict[str, Any]) -> Value | None:
    if row.get("gain") is None:
        return None
    return row["gain"], Z * (row["gain_se"] or 0)


def _contexts(models: Sequence[Results]) -> Iterator[Column]:
    rows = []
    for m in models:
        own = protocols_of(m, "contexts").get("cepe_tail_matched", {"rows": []})["rows"]
        own = [r for r in own if r["context"] == "own"]
        rows.append({r["context_tokens"]: _gain(r) for r in own})
    if (most := _shared([set(r) for r in rows])) is not None:
        values = [r.get(most) for r in rows]
        yield Column(f"gain of {most:,} tokens of context, nats", values, lambda v: f"{v:.3f}")


def _retrieval(models: Sequence[Results]) -> Iterator[Column]:
    rows = []
    for m in models:
        own = (result_of(m, "retrieval_perplexity") or {"rows": []})["rows"]
        rows.append({r["k"]: _gain(r) for r in own if r["method"] == "contexts"})
    if (k := _shared([set(r) for r in rows])) is not None:
        values = [r.get(k) for r in rows]
        yield Column(f"gain of {k} retrieved passages, nats", values, lambda v: f"{v:.3f}")


def _qa(models: Sequence[Results]) -> Iterator[Column]:
    rows = []
    for m in models:
        cells = (result_of(m, "qa") or {"cells": []})["cells"]
        rows.append({c["k"]: _interval(c, "em") for c in cells if c["setting"] == "retrieved"})
    if (k := _shared([set(r) for r in rows])) is not None:
        yield Column(f"QA over {k} passages, EM %", [r.get(k) for r in rows], _percent)


def _template(models: Sequence[Results]) -> Iterator[Column]:
    rows = []
    for m in models:
        cells = (result_of(m, "template") or {"cells": []})["cells"]
        rows.append({c["count"]: _interval(c, "follows") for c in cells if c["kind"] == "all"})
    if (count := _shared([set(r) for r in rows])) is not None:
        values = [r.get(count) for r in rows]
        yield Column(f"in the template behind {count} contexts, %", values, _percent)


def _efficiency(models: Sequence[Results]) -> Iterator[Column]:
    rows = [
        {r["length"]: r for r in (result_of(m, "efficiency") or {"rows": []})["rows"]}
        for m in models
    ]
    if (length := _shared([set(r) for r in rows])) is None:
        return
    at = [r.get(length, {}) for r in rows]
    speed = [r.get("prefill_tokens_per_second") for r in at]
    yield Column(f"prefill at {length:,}, tokens/s", _sure(speed), _count, ranked=False)
    decode = [r.get("decode_seconds") for r in at]
    title = "decode, ms a token"
    yield Column(title, _sure(decode), lambda v: f"{1000 * v:.1f}", rising=False, ranked=False)
    cache = [r.get("cache_bytes") for r in at]
    yield Column("cache, MiB", _sure(cache), lambda v: f"{v / 2**20:,.1f}", rising=False)


COLUMNS: dict[str, Callable[[Sequence[Results]], Iterator[Column]]] = {
    "perplexity": _perplexity,
    "passkey": _mean("passkey", "passkey"),
    "k_max": _k_max,
    "needle": _mean("needle", "needle"),
    "ruler": _ruler,
    "babi": _scores("babi", "babi-style, %, mean of the grid"),
    "short": _scores("short", "short contexts, %, mean"),
    "contexts": _contexts,
    "retrieval_perplexity": _retrieval,
    "qa": _qa,
    "template": _template,
    "efficiency": _efficiency,
}


def _cells(column: Column, odd: Sequence[bool]) -> list[str]:
    """The texts of a column; the best are bold if all were measured alike and some are worse."""
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


def section(models: Sequence[Results]) -> Iterator[str]:
    """The lines of the table; none without results."""
    columns: list[tuple[str, list[str]]] = []
    for task in tasks_of(models):
        odd = unlike(models, task)
        found = list(COLUMNS[task](models)) if task in COLUMNS else []
        found = [c for c in found if any(value is not None for value in c.values)]
        columns += [(column.name, _cells(column, odd)) for column in found]
    if not columns:
        return
    yield from ("## In short", "")
    if len(models) > 1:
        yield (
            "Bold: the best of a column and what cannot be told from it (unpaired, so cautious), "
            "where all were measured alike and some are worse. k_max, effective lengths and times "
            "have no interval: none is called the best."
        )
    if any(MARK in cell for _, cells in columns for cell in cells):
        yield f"{MARK.strip()}: measured under other settings than the model in the first row."
    yield "± is half a 95% interval; how each number was measured stands with its table below."
    yield ""
    names = [name for name, _ in columns]
    rows = [[m["label"], *(cells[i] for _, cells in columns)] for i, m in enumerate(models)]
    yield from table(["model", *names], rows)
