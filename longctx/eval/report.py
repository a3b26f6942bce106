"""`results.json` and `report.md`: what was measured, under which protocol, of which model.

Tables and figures are made from results files alone, so earlier evaluations join by name. Costs
about a second, all of it drawing.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from longctx.errors import UserError
from longctx.eval.context_figures import draw_contexts
from longctx.eval.context_report import context_sections
from longctx.eval.figures import Results, draw, protocols_of, result_of
from longctx.eval.tables import plus_minus, table
from longctx.eval.template import section as template_section

RESULTS = "results.json"
FORMAT = 1
NOTES = {
    "sliding_new_tokens": "A window of the given width moves by the stride, only its new tokens "
    "are scored",
    "single_pass_buckets": "One forward over the first tokens of each document, all scored; the "
    "figure splits the longest by position",
    "token_matched": "The same target tokens in every column, only the context before them differs",
}


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is either complete or absent."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_results(results: Results, out: Path) -> None:
    """Writes `out/results.json`."""
    text = json.dumps({"format": FORMAT} | results, indent=1, allow_nan=False)
    write_atomically(out / RESULTS, text + "\n")


def read_results(path: Path) -> Results:
    """Reads an evaluation's `results.json`.

    Args:
        path: its directory, or the file.

    Raises:
        UserError: if there is none, or it is not one of ours.
    """
    file = path / RESULTS if path.is_dir() else path
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: no {RESULTS} here (evaluate.py out=DIR writes it)") from error
    except ValueError as error:
        raise UserError(f"{file}: not readable JSON") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{file}: not the results of an evaluation, format {FORMAT}")
    return found


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
    rates = {n: [c["rate"] for c in cells if c["length"] == n] for n in lengths}
    return {n: f"{100 * sum(r) / len(r):.1f}" for n, r in rates.items()}


def _bucket_gain(model: Results) -> str:
    rows = protocols_of(model)["single_pass_buckets"]["rows"]
    return f"{max(rows, key=lambda row: int(row['length']))['bucket_gain']:,}"


def _models_section(models: Sequence[Results]) -> list[str]:
    head = ["model", "checkpoint", "attention", "rope", "dtype", "native window", "window"]
    rows = [
        [
            m["label"],
            f"`{m['model']}`",
            _short(m["attention"]),
            _short(m["rope"]),
            m["dtype"],
            f"{m['native_window']:,}",
            f"{m['window']:,}",
        ]
        for m in models
    ]
    return ["## Models", "", *table(head, rows)]


def _short(settings: Any) -> str:
    """`name (number=value, ...)` of an attention or rope setting."""
    if not isinstance(settings, dict):
        return str(settings)
    numbers = ", ".join(f"{k}={v}" for k, v in settings.items() if k != "name" and v is not None)
    return f"{settings.get('name', '')} ({numbers})" if numbers else str(settings.get("name", ""))


def _perplexity_section(models: Sequence[Results]) -> Iterator[str]:
    names = dict.fromkeys(name for model in models for name in protocols_of(model))
    for name in names:
        own = next(protocols_of(m)[name] for m in models if name in protocols_of(m))
        facts = ", ".join(f"{k} {own[k]}" for k in ("stride", "target_tokens") if k in own)
        yield f"## Perplexity, `{name}`"
        yield ""
        yield f"{NOTES[name]}{f' ({facts})' if facts else ''}."
        yield (
            f"{own['documents']} documents, {own['skipped']} shorter ones skipped, "
            f"{own['rows'][-1]['tokens']:,} tokens scored at the last length; "
            f"BOS at the {own['bos'].replace('_', ' ')}; ± is one standard error."
        )
        yield ""
        gain = ("bucket gain", _bucket_gain) if name == "single_pass_buckets" else None
        yield from _by_length(
            [m for m in models if name in protocols_of(m)],
            lambda model, name=name: _perplexity(model, name),  # type: ignore[misc]
            gain,
        )


def _passkey_section(models: Sequence[Results]) -> Iterator[str]:
    if found := [m for m in models if result_of(m, "passkey")]:
        own = result_of(found[0], "passkey") or {}
        yield from ("## Passkey", "")
        yield (
            f"Keys retrieved, %, mean over {len({c['depth'] for c in own['cells']})} depths and "
            f"{own['cells'][0]['samples']} prompts a cell, exact match, {own['mode']}; "
            "prompts truncated: 0; guessing: 0.00."
        )
        yield ""
        yield from _by_length(found, _passkey)
    if found := [m for m in models if result_of(m, "k_max")]:
        yield from ("## Effective window, k_max", "")
        rows = []
        for model in found:
            own = result_of(model, "k_max") or {}
            trials = f"{len(own['cells'])} x {own['cells'][0]['samples']}"
            limit = f"{100 * own['threshold']:.0f} %"
            cells = [f"{own['k_max']:,}", f"{own['target']:,}", trials, limit, own["mode"]]
            rows.append([model["label"], *cells])
        yield from table(["model", "k_max", "target", "trials", "threshold", "mode"], rows)


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def differences(models: Sequence[Results]) -> Iterator[str]:
    """One line for each setting of a shared task in which a model differs from the first."""
    first, *others = models
    for model in others:
        for task in first["tasks"].keys() & model["tasks"].keys():
            ours = dict(_flat(first["tasks"][task]["settings"]))
            theirs = dict(_flat(model["tasks"][task]["settings"]))
            for key in sorted(ours.keys() | theirs.keys()):
                if ours.get(key) != theirs.get(key):
                    yield (
                        f"{model['label']}, {task}: {key} is {theirs.get(key)}, "
                        f"not {ours.get(key)} as for {first['label']}"
                    )


def write_report(models: Sequence[Results], out: Path) -> str:
    """Draws the figures and writes `out/report.md`.

    Args:
        models: contents of `results.json`, the evaluated model first.
        out: directory to write to.

    Returns:
        The text of the report.
    """
    lines = ["# Evaluation", "", *_models_section(models)]
    lines += _perplexity_section(models)
    lines += _passkey_section(models)
    lines += context_sections(models)
    lines += template_section(models)
    if unequal := list(differences(models)):
        lines += ["## Not measured alike", "", *(f"- {line}" for line in unequal), ""]
    lines += ["## Figures", ""]
    for caption, name in [*draw(models, out), *draw_contexts(models, out)]:
        lines += [f"![{caption}]({name})", ""]
    own = models[0]
    versions = ", ".join(f"{name} {version}" for name, version in own["versions"].items())
    lines += [
        f"Made by `{own['command']}`, seed {own['seed']}, commit {own['commit']}, {versions}."
    ]
    text = "\n".join(lines) + "\n"
    write_atomically(out / "report.md", text)
    return text
