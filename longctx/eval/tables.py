"""Pieces of Markdown tables."""

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, with an empty one behind it."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def plus_minus(value: float, error: float | None, digits: int) -> str:
    """A number and its standard error, where there is one."""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
