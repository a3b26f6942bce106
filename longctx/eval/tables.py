"""Pieces of Markdown tables."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, with an empty one behind it."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return ["| " + " | ".join(line) + " |" for line in cells] + [""]


def image(caption: str, name: str) -> list[str]:
    """Lines of an image, with an empty one behind it."""
    return [f"![{caption}]({name})", ""]


def length_table(
    rows: Mapping[str, Mapping[int, str]], more: tuple[str, Mapping[str, str]] | None = None
) -> list[str]:
    """A row a model, a column a length.

    Args:
        rows: label of a model -> length, tokens -> its cell; models without any are left out.
        more: head of one more column, and its cell for each label.
    """
    lengths = sorted({length for row in rows.values() for length in row})
    head = ["model", *(f"{n:,}" for n in lengths), *([more[0]] if more else [])]
    return table(
        head,
        [
            [label, *(row.get(n, "") for n in lengths), *([more[1][label]] if more else [])]
            for label, row in rows.items()
            if row
        ],
    )


def plus_minus(value: float, error: float | None, digits: int) -> str:
    """A number and its standard error, where there is one."""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def percent(share: float, interval: Sequence[float] | None = None) -> str:
    """A share in per cent, with its interval in brackets where there is one.

    >>> percent(0.5, [0.25, 0.75])
    '50.0 [25.0, 75.0]'
    """
    if interval is None:
        return f"{100 * share:.1f}"
    low, high = (100 * end for end in interval)
    return f"{100 * share:.1f} [{low:.1f}, {high:.1f}]"


def token_range(rows: Sequence[dict[str, Any]]) -> str:
    """The fewest and the most tokens of prompts in the `tokens` of some rows."""
    low, high = min(r["tokens"][0] for r in rows), max(r["tokens"][1] for r in rows)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def gain_cell(row: dict[str, Any]) -> str:
    """Perplexity, and in brackets by how much the loss is below that without contexts."""
    text = plus_minus(row["perplexity"], row["perplexity_se"], 2)
    if row.get("gain") is not None and row["context_tokens"]:
        text += f" (gain {plus_minus(row['gain'], row['gain_se'], 3)})"
    if "effective_passages" in row:
        text += f", {row['effective_passages']:.1f} mixed"
    return text
