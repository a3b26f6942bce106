"""`report.md` and `report.html`: what was measured, under which protocol, of what.

Tables and figures are made from results files alone, so earlier evaluations join by name. Each
task writes its own section; the page is rendered from the same lines. Costs a second or two, all of
it drawing.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longctx.eval import headline, page
from longctx.eval.config import found_tasks
from longctx.eval.results import Results, differences, result_of, tasks_of, write_atomically
from longctx.eval.tables import table

NAMED = 4  # models in a title, at most


def _models_section(models: Sequence[Results]) -> list[str]:
    head = ["model", "checkpoint", "parameters", "attention", "rope", "dtype", "device"]
    head += ["native window", "window"]
    rows = [
        [
            m["label"],
            f"`{m['model']}`",
            f"{m['parameters']:,}" if "parameters" in m else "",
            _short(m["attention"]),
            _short(m["rope"]),
            m["dtype"],
            m.get("device_name") or m.get("device", ""),
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
    named = [(k, v) for k, v in settings.items() if k != "name" and v is not None]
    numbers = ", ".join(f"{k}={v:.10g}" if isinstance(v, float) else f"{k}={v}" for k, v in named)
    return f"{settings.get('name', '')} ({numbers})" if numbers else str(settings.get("name", ""))


def _unequal_section(models: Sequence[Results]) -> Iterator[str]:
    if unequal := list(differences(models)):
        yield from ("## Not measured alike", "", *(f"- {line}" for line in unequal), "")


def _made_section(models: Sequence[Results]) -> Iterator[str]:
    yield from ("## How it was made", "")
    for m in models:
        tasks: dict[str, list[str]] = {}
        for task, entry in m["tasks"].items():  # runs at different times fill one directory
            tasks.setdefault(_made(entry.get("made", m)), []).append(task)
        for made, names in tasks.items():
            which = "" if len(tasks) == 1 else f" ({', '.join(names)})"
            yield f"- {m['label']}{which}: {made}"
    yield ""


def _made(by: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in by["versions"].items())
    commit = re.sub(r"^(\w{12})\w+", r"\1", str(by["commit"]))
    return f"by `{by['command']}`, seed {by['seed']}, commit {commit}, {versions}"


def _placed(models: Sequence[Results]) -> list[Results]:
    """The models with their place in the report, and a label that no other one has."""
    labels: list[str] = []
    for model in models:
        own = label = str(model["label"])
        number = 1
        while label in labels:
            number += 1
            label = f"{own} ({number})"
        labels.append(label)
    numbered = enumerate(zip(models, labels, strict=True))
    about = {"models": len(models)}
    return [model | about | {"label": label, "place": i} for i, (model, label) in numbered]


def headline_of(models: Sequence[Results]) -> Iterator[str]:
    """The first table: the main numbers of every task that some model has."""
    kinds = found_tasks()
    known = [name for name in tasks_of(models) if name in kinds]
    columns = {name: list(kinds[name].columns(models)) for name in known}
    compared_by = {name: kinds[name].compared_by for name in known}
    yield from headline.section(models, columns, compared_by)


def sections(models: Sequence[Results], out: Path) -> Iterator[str]:
    """The sections of all tasks that there are results for.

    Args:
        models: contents of `results.json`.
        out: directory to draw figures into.
    """
    for name, kind in found_tasks().items():
        if found := [(m, r) for m in models if (r := result_of(m, name))]:
            yield from kind.section(found, out)


def write_report(models: Sequence[Results], out: Path) -> str:
    """Draws the figures and writes `out/report.md` and `out/report.html`.

    Args:
        models: contents of `results.json`, the evaluated model first.
        out: directory to write to.

    Returns:
        The text of `report.md`.
    """
    models = _placed(models)
    names = ", ".join(str(m["label"]) for m in models)
    title = f"# Evaluation: {names}" if len(models) <= NAMED else f"# {len(models)} models"
    lines = [title, "", *headline_of(models), *_models_section(models)]
    lines += _unequal_section(models)
    lines += sections(models, out)
    lines += _made_section(models)
    text = "\n".join(lines).rstrip() + "\n"
    write_atomically(out / "report.md", text)
    write_atomically(out / "report.html", page.render(lines, out))
    return text
