"""`results.json`, `report.md` and `report.html`: what was measured, under which protocol, of what.

Tables and figures are made from results files alone, so earlier evaluations join by name. A section
is a function of the results that yields lines of Markdown; the page is rendered from the same
lines. Costs a second or two, all of it drawing.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from longctx.errors import UserError
from longctx.eval import efficiency, headline, page, template
from longctx.eval.compare import differences
from longctx.eval.context_report import context_sections
from longctx.eval.figures import Results
from longctx.eval.length_report import passkey_section, perplexity_section
from longctx.eval.probe_report import probe_sections
from longctx.eval.tables import table

RESULTS = "results.json"
FORMAT = 1
NAMED = 4  # models in a title, at most
# In the order of the report; each is silent where there are no results.
SECTIONS: tuple[Callable[[Sequence[Results], Path], Iterator[str]], ...] = (
    perplexity_section,
    passkey_section,
    probe_sections,
    context_sections,
    template.section,
    efficiency.section,
)


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
    return [model | {"label": label, "place": i} for i, (model, label) in numbered]


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
    lines = [title, "", *headline.section(models), *_models_section(models)]
    lines += _unequal_section(models)
    for section in SECTIONS:
        lines += section(models, out)
    lines += _made_section(models)
    text = "\n".join(lines).rstrip() + "\n"
    write_atomically(out / "report.md", text)
    write_atomically(out / "report.html", page.render(lines, out))
    return text
