"""Pieces of Markdown tables."""

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, with an empty one behind it."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return ["| " + " | ".join(line) + " |" for line in cells] + [""]


def image(caption: str, name: str) -> list[str]:
    """Lines of an image, with an empty one behind it."""
    return [f"![{caption}]({name})", ""]


def plus_minus(value: float, error: float | None, digits: int) -> str:
    """A number and its standard error, where there is one."""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
