"""Tables and figures of the tasks that take lengths: perplexity, passkey, k_max."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from longctx.eval.answers import wilson
from longctx.eval.figures import (
    Results,
    k_max_figure,
    perplexity_figure,
    protocols_of,
    result_of,
)
from longctx.eval.probe_figures import WINDOWS, passkey_figure
from longctx.eval.tables import image, plus_minus, table

NOTES = {
    "sliding_new_tokens": "A window of the given width moves by the stride, only its new tokens "
    "are scored",
    "whole_window": "A window of the given width moves by the stride over all documents as one "
    "stream, all of its tokens are scored each time",
    "single_pass_buckets": "One forward over the first tokens of each document, all scored; the "
    "figure splits the longest by position. Bucket gain: the largest position, in tokens, whose "
    "loss is still two standard errors below that of half as far",
    "token_matched": "The same target tokens in every column, only the context before them differs",
}
MODES = {
    "teacher_forced": "read off one forward pass (what greedy decoding would say)",
    "generate": "decoded greedily",
}


def _by_length(
    models: Sequence[Results],
    rows_of: Callable[[Results], dict[int, str]],
    extra: tuple[str, Callable[[Results], str]] | None = None,
) -> list[str]:
    """A row per model, a column per length; models without any are left out."""
    found = [(model, rows_of(model)) for model in models]
    lengths = sorted({length for _, row in found for length in row})
    head = ["model", *(f"{n:,}" for n in lengths)] + ([extra[0]] if extra else [])
    rows = [
        [m["label"], *(row.get(n, "") for n in lengths)] + ([extra[1](m)] if extra else [])
        for m, row in found
        if row
    ]
    return table(head, rows)


def _perplexity(model: Results, protocol: str) -> dict[int, str]:
    rows = protocols_of(model).get(protocol, {"rows": []})["rows"]
    return {r["length"]: plus_minus(r["perplexity"], r["perplexity_se"], 2) for r in rows}


def _passkey(model: Results) -> dict[int, str]:
    cells = (result_of(model, "passkey") or {"cells": []})["cells"]
    lengths = {c["length"] for c in cells}
    found = {}
    for n in lengths:
        inside = [c for c in cells if c["length"] == n]
        prompts = sum(c["samples"] for c in inside)
        right = round(sum(c["rate"] * c["samples"] for c in inside))
        low, high = wilson(right, prompts)
        found[n] = f"{100 * right / prompts:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    return found


def _bucket_gain(model: Results) -> str:
    rows = protocols_of(model)["single_pass_buckets"]["rows"]
    return f"{max(rows, key=lambda row: int(row['length']))['bucket_gain']:,}"


def perplexity_section(models: Sequence[Results], out: Path) -> Iterator[str]:
    """One table and one figure a protocol."""
    names = dict.fromkeys(name for model in models for name in protocols_of(model))
    for name in names:
        own = next(protocols_of(m)[name] for m in models if name in protocols_of(m))
        facts = ", ".join(
            f"{k.replace('_', ' ')} {own[k]}" for k in ("stride", "target_tokens") if k in own
        )
        yield f"## Perplexity, `{name}`"
        yield ""
        yield f"{NOTES[name]}{f' ({facts})' if facts else ''}."
        yield (
            f"{own['documents']} documents, {own['skipped']} shorter ones skipped, "
            f"{own['rows'][-1]['tokens']:,} tokens scored at the last length; "
            f"columns: tokens of context; BOS at the {own['bos'].replace('_', ' ')}; ± is one "
            "standard error."
        )
        yield ""
        gain = ("bucket gain", _bucket_gain) if name == "single_pass_buckets" else None
        yield from _by_length(
            [m for m in models if name in protocols_of(m)],
            lambda model, name=name: _perplexity(model, name),  # type: ignore[misc]
            gain,
        )
        figure = perplexity_figure(models, name, out / f"perplexity_{name}.png")
        against = "position" if gain else "length"
        yield from image(f"`{name}` against {against}; bars: one standard error", figure)


def passkey_section(models: Sequence[Results], out: Path) -> Iterator[str]:
    """Keys retrieved by length and depth, and the effective window."""
    if found := [m for m in models if result_of(m, "passkey")]:
        own = result_of(found[0], "passkey") or {}
        yield from ("## Passkey", "")
        yield (
            f"Keys retrieved, %, mean over {len({c['depth'] for c in own['cells']})} depths and "
            f"{own['cells'][0]['samples']} prompts a cell, exact match, {MODES[own['mode']]}; "
            "columns: tokens of the prompts; 95% Wilson intervals; prompts truncated: 0; guessing: "
            "0.00."
        )
        yield ""
        yield from _by_length(found, _passkey)
        yield from image(f"Keys found; {WINDOWS}", passkey_figure(found, out / "passkey.png"))
    if found := [m for m in models if result_of(m, "k_max")]:
        yield from ("## Effective window, k_max", "")
        yield (
            "The largest distance between a key and the end of its prompt up to which keys are "
            "found at the threshold's rate or better at every distance tested (Position "
            "Interpolation's effective window). Target: length of the prompts; trials: distances x "
            "prompts at each."
        )
        yield ""
        rows = []
        for model in found:
            own = result_of(model, "k_max") or {}
            trials = f"{len(own['cells'])} x {own['cells'][0]['samples']}"
            limit = f"{100 * own['threshold']:.0f} %"
            mode = own["mode"].replace("_", " ")
            cells = [f"{own['k_max']:,}", f"{own['target']:,}", trials, limit, mode]
            rows.append([model["label"], *cells])
        yield from table(["model", "k_max, tokens", "target", "trials", "threshold", "mode"], rows)
        yield from image("Passkey by distance", k_max_figure(found, out / "k_max.png"))
