"""Which evaluation tasks there are, and the typed settings of an evaluation with all of them."""

from dataclasses import dataclass, field, fields
from importlib import import_module
from pkgutil import iter_modules
from typing import TypeVar

from longctx.eval import tasks
from longctx.eval.evaluation import Evaluation
from longctx.eval.task import Task

T = TypeVar("T")


def found_tasks() -> dict[str, type[Task]]:
    """The task of each file in `longctx/eval/tasks/`, in the order of a report.

    Raises:
        TypeError: if a file does not hold exactly one, or a setting has a name of the contract.
    """
    kinds = {}
    for _, name, _ in iter_modules(tasks.__path__):
        module = import_module(f"{tasks.__name__}.{name}")
        own = [v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__]
        found = [v for v in own if isinstance(v, type) and issubclass(v, Task)]
        if len(found) != 1:
            raise TypeError(f"{module.__name__} must hold one Task, not {len(found)}")
        if taken := {f.name for f in fields(found[0])} & set(dir(Task)):
            raise TypeError(f"{module.__name__}: a setting cannot be called {', '.join(taken)}")
        kinds[name] = found[0]
    return dict(sorted(kinds.items(), key=lambda entry: (entry[1].place, entry[0])))


def help_of_tasks() -> str:
    """A line for each task: its name, and the first line of its docstring."""
    kinds = found_tasks()
    width = max(map(len, kinds))
    return "\n".join(
        f"  {name:{width}}  {(kind.__doc__ or '').splitlines()[0]}" for name, kind in kinds.items()
    )


def _with_tasks(kind: type[T]) -> type[T]:
    """A dataclass-to-be with a field for each task, its settings."""
    kind.__annotations__ = kinds = found_tasks()
    for name, task in kinds.items():
        setattr(kind, name, field(default_factory=task))
    return kind


@dataclass(frozen=True)
@_with_tasks
class EvalConfig(Evaluation):
    """One evaluation of one model, with the settings of every task in a field of its name."""
