"""Tables of RULER, the needle map, babi-style facts and short contexts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longctx.eval.config_ruler import RULER_TASKS
from longctx.eval.figures import Results, result_of
from longctx.eval.length_report import MODES
from longctx.eval.probe_figures import WINDOWS, babi_figure, needle_figure, ruler_figure
from longctx.eval.ruler_length import ENOUGH, effective
from longctx.eval.tables import image, table

Found = list[tuple[Results, dict[str, Any]]]


def probe_sections(models: Sequence[Results], out: Path) -> Iterator[str]:
    """The lines of all tables and figures that there are results for."""
    for name, section in SECTIONS.items():
        if found := [(m, r) for m in models if (r := result_of(m, name))]:
            yield from section(found, out)


def _models(found: Found) -> list[Results]:
    return [model for model, _ in found]


def _percent(row: dict[str, Any], key: str = "score", interval: str = "interval") -> str:
    if row[interval] is None:
        return f"{100 * row[key]:.1f}"
    low, high = row[interval]
    return f"{100 * row[key]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _lengths(found: Found, cells: str) -> list[int]:
    return sorted({int(row["length"]) for _, result in found for row in result[cells]})


def _tokens(rows: Sequence[dict[str, Any]]) -> str:
    low, high = min(r["tokens"][0] for r in rows), max(r["tokens"][1] for r in rows)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _ruler(found: Found, out: Path) -> Iterator[str]:
    lengths, own = _lengths(found, "averages"), found[0][1]
    yield from ("## RULER", "")
    yield (
        f"Average over tasks, per cent with 95% intervals; NVIDIA's prompts and scores, greedy, "
        f"{own['cells'][0]['samples']} samples of a task at a length; columns: tokens, the room "
        "for the answer included; prompts truncated: 0. Effective length: the largest of these "
        f"lengths whose average reaches {own['threshold']:g}, in brackets by the ends of the "
        f"intervals; none is told with fewer than {ENOUGH} samples of a task. Weighted: means over "
        "lengths with rising or falling weights."
    )
    yield ""
    rows = []
    for model, result in found:
        averages = {a["length"]: a for a in result["averages"]}
        count = max(a["tasks"] for a in result["averages"])
        name = model["label"] + (" (chat template)" if result["chat"] else "")
        cells = [_percent(averages[n]) if n in averages else "" for n in lengths]
        told = effective(result)
        reached = "too few samples" if told is None else str(told)
        weights = [f"{100 * result[key]:.1f}" for key in ("rising", "falling")]
        rows.append([name, f"{count} of {len(RULER_TASKS)}", *cells, reached, *weights])
    head = ["model", "tasks", *(f"{n:,}" for n in lengths), "effective length"]
    yield from table([*head, "weighted, rising", "weighted, falling"], rows)
    rows = []
    for model, result in found:
        for task in dict.fromkeys(c["task"] for c in result["cells"]):
            inside = {c["length"]: c for c in result["cells"] if c["task"] == task}
            cells = [_percent(inside[n]) if n in inside else "" for n in lengths]
            longest = inside[max(inside)]
            tokens = f"{_tokens([longest])} + {longest['new_tokens']}"
            rows.append([model["label"], task, *cells, tokens])
    head = ["model", "task", *(f"{n:,}" for n in lengths), "tokens at the longest"]
    yield from table(head, rows)
    figure = ruler_figure(_models(found), out / "ruler.png")
    yield from image(f"RULER by task and length; {WINDOWS}", figure)


def _needle(found: Found, out: Path) -> Iterator[str]:
    lengths, own = _lengths(found, "cells"), found[0][1]
    depths = len({c["depth"] for c in own["cells"]})
    yield from ("## Needle map", "")
    yield (
        f"One fact in real text ({own['haystack'].replace('_', '-')}), found to the letter, per "
        f"cent; mean over {depths} depths and {own['cells'][0]['samples']} prompts a cell, "
        f"{MODES[own['mode']]}; columns: tokens of the prompts; prompts truncated: 0; guessing: 0."
    )
    yield ""
    rows = []
    for model, result in found:
        rates: dict[int, list[float]] = {}
        for cell in result["cells"]:
            rates.setdefault(cell["length"], []).append(cell["rate"])
        means = {n: f"{100 * sum(r) / len(r):.1f}" for n, r in rates.items()}
        cells = [means.get(n, "") for n in lengths]
        rows.append([model["label"], *cells, _tokens(result["cells"])])
    yield from table(["model", *(f"{n:,}" for n in lengths), "prompt tokens"], rows)
    yield from image(f"Facts found; {WINDOWS}", needle_figure(_models(found), out / "needle.png"))


def _babi(found: Found, out: Path) -> Iterator[str]:
    lengths, own = _lengths(found, "cells"), found[0][1]
    yield from ("## Babi-style questions", "")
    yield (
        f"Stories of {own['facts']} facts between sentences of real text "
        f"({own['haystack'].replace('_', '-')}), {own['cells'][0]['samples']} questions a cell; "
        "columns: tokens of the prompts; right is the one word on the first line; per cent with "
        f"95% Wilson intervals; guessing a place: {100 * own['guessing']:.1f}; prompts truncated: "
        "0. Ours: not bAbI's stories, and no number of BABILong's."
    )
    yield ""
    rows = []
    for model, result in found:
        for hops in sorted({c["hops"] for c in result["cells"]}):
            inside = {c["length"]: c for c in result["cells"] if c["hops"] == hops}
            cells = [_percent(inside[n]) if n in inside else "" for n in lengths]
            rows.append([model["label"], str(hops), *cells, _tokens(list(inside.values()))])
    head = ["model", "supporting facts", *(f"{n:,}" for n in lengths), "prompt tokens"]
    yield from table(head, rows)
    yield from image("Babi-style questions", babi_figure(_models(found), out / "babi.png"))


def _short(found: Found, out: Path) -> Iterator[str]:
    yield from ("## Short contexts", "")
    yield (
        "Per cent with 95% intervals. `continuation` is ours: the sentence that follows some "
        "held-out text among three of other documents, the likeliest per token; the others are "
        "lm-eval's, with its prompts."
    )
    yield ""
    rows = []
    for model, result in found:
        for cell in result["cells"]:
            guess = "" if cell["guessing"] is None else f"{100 * cell['guessing']:.1f}"
            about = [f"`{cell['kind']}`", cell["metric"], f"{cell['samples']:,}"]
            rows.append([model["label"], *about, _percent(cell), guess])
    yield from table(["model", "task", "metric", "questions", "score", "guessing"], rows)


SECTIONS = {"ruler": _ruler, "needle": _needle, "babi": _babi, "short": _short}
