"""Whether models were measured alike: numbers of one column compare only then."""

from collections.abc import Iterator, Sequence
from typing import Any

from longctx.eval.figures import Results

OF_ALL_TASKS = ("dtype", "tokenizer_sha256")  # facts of a model that move every number
OF_SPEED = ("device_name", "dtype")


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
        for key in OF_ALL_TASKS:
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


def unlike(models: Sequence[Results], task: str) -> list[bool]:
    """Which models were not measured like the first that has the task."""
    first = next(m for m in models if task in m["tasks"])
    facts = OF_SPEED if task == "efficiency" else OF_ALL_TASKS
    return [
        task in m["tasks"]
        and (
            any(True for _ in _unequal(first, m, task))
            or any(m.get(key) != first.get(key) for key in facts)
        )
        for m in models
    ]
