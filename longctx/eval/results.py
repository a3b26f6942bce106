"""`results.json`: reading, writing, and whether several models were measured in the same way."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longctx.errors import UserError

RESULTS = "results.json"
FORMAT = 1
FACTS = ("dtype", "tokenizer_sha256")  # facts of a model that change every number

Results = dict[str, Any]


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


def result_of(results: Results, task: str) -> dict[str, Any] | None:
    """A task's result in one `results.json`, if it is there."""
    entry = results["tasks"].get(task)
    return None if entry is None else entry["result"]


def protocols_of(results: Results, task: str = "perplexity") -> dict[str, Any]:
    """A task's results by protocol name."""
    result = result_of(results, task)
    return {} if result is None else result["protocols"]


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _unequal(ours: Results, theirs: Results, task: str) -> Iterator[tuple[str, Any, Any]]:
    """(setting, its value in `theirs`, in `ours`) where a task's settings differ."""
    a, b = (dict(_flat(m["tasks"][task]["settings"])) for m in (ours, theirs))
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key):
            yield key, b.get(key), a.get(key)


def tasks_of(models: Sequence[Results]) -> list[str]:
    """Names of all tasks that some model has, in their order."""
    return list(dict.fromkeys(task for m in models for task in m["tasks"]))


def differences(models: Sequence[Results]) -> Iterator[str]:
    """One line for each setting in which a model differs from the first that has the task."""
    for model in models[1:]:
        for key in FACTS:
            here, there = model.get(key), models[0].get(key)
            if here is not None and there is not None and here != there:
                yield f"{model['label']}: {key} is {here}, not {there} as for {models[0]['label']}"
    for task in tasks_of(models):
        first, *others = [m for m in models if task in m["tasks"]]
        for model in others:
            for key, here, there in _unequal(first, model, task):
                yield (
                    f"{model['label']}, {task}: {key} is {here}, not {there} "
                    f"as for {first['label']}"
                )


def unlike(models: Sequence[Results], task: str, facts: Sequence[str] = FACTS) -> list[bool]:
    """Which models were not measured like the first that has the task.

    Args:
        models: of a report.
        task: its name.
        facts: of a model that must be equal besides the task's settings.
    """
    first = next(m for m in models if task in m["tasks"])
    return [
        task in m["tasks"]
        and (
            any(True for _ in _unequal(first, m, task))
            or any(m.get(key) != first.get(key) for key in facts)
        )
        for m in models
    ]
