"""Statistics of token stores: document lengths, domain shares, and how far positions reach.

Reads only the indices (12 bytes per document), never a token: seconds for 10 million documents.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from longctx.data.store import META, Store
from longctx.errors import UserError

POSITIONS = (4096, 8192, 32768, 131072)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
ALL = "all"
HELP = """\
Tables and a figure for one or more token stores, or for a folder with one store per domain.

Lengths are tokens including BOS and EOS. "Beyond 4,096" is the share of all tokens whose position
in their own document is 4,096 or more. Only these can teach a model with a window of 4,096 to use
longer contexts, however long the training rows are.
"""
EXAMPLES = """\
examples:
  python data_prep/stats.py data/lab/text
  python data_prep/stats.py OUT --output OUT/stats     (OUT/arxiv, OUT/book, ... are stores)
"""

Lengths = NDArray[np.int64]


def find_stores(paths: Sequence[Path]) -> dict[str, Lengths]:
    """Document lengths of every store, by domain (the name of the store's folder).

    Args:
        paths: stores, or folders of stores; stores with the same name form one domain.

    Raises:
        UserError: if a path is neither, or a store is damaged.
    """
    found: dict[str, list[Lengths]] = {}
    for path in paths:
        stores = [path] if (path / META).is_file() else [p.parent for p in path.glob(f"*/{META}")]
        if not stores:
            raise UserError(f"{path}: no token store here or in the folders directly below")
        for store in sorted(stores):
            found.setdefault(store.resolve().name, []).append(Store(store).lengths)
    return {name: np.concatenate(lengths) for name, lengths in found.items()}


def beyond(lengths: Lengths, positions: Sequence[int] | Lengths) -> list[float]:
    """Share of tokens at each in-document position (counted from 0) or a later one."""
    ordered = np.sort(lengths)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(ordered)])
    total = max(int(ends[-1]), 1)
    firsts = np.searchsorted(ordered, positions, side="right")
    return [
        (int(ends[-1] - ends[first]) - (len(ordered) - int(first)) * int(at)) / total
        for first, at in zip(firsts, positions, strict=True)
    ]


def describe(lengths: Lengths) -> dict[str, Any]:
    """Counts, lengths, histogram and positions of one set of documents.

    Args:
        lengths: `[documents]`, tokens.

    Returns:
        `documents`, `tokens`; `mean`, `median`, `max` in tokens; `histogram`, rows `from` (a power
        of two, up to the next one), `documents`, `tokens`; `beyond`, position -> share of tokens
        at that in-document position (counted from 0) or a later one.
    """
    tokens = int(lengths.sum())
    powers = np.frexp(lengths.astype(np.float64))[1] - 1  # exact: lengths are far below 2^53
    documents, sums = np.bincount(powers), np.bincount(powers, weights=lengths)
    rows = zip(documents.tolist(), sums.tolist(), strict=True)
    return {
        "documents": len(lengths),
        "tokens": tokens,
        "mean": tokens / len(lengths) if len(lengths) else 0.0,
        "median": float(np.median(lengths)) if len(lengths) else 0.0,
        "max": int(lengths.max(initial=0)),
        "histogram": [
            {"from": 1 << power, "documents": count, "tokens": int(total)}
            for power, (count, total) in enumerate(rows)
            if count
        ],
        "beyond": dict(zip(map(str, POSITIONS), beyond(lengths, POSITIONS), strict=True)),
    }


def summarise(domains: dict[str, Lengths]) -> dict[str, Any]:
    """`describe` for all documents (`all`) and for each domain (`domains`, with its `share`)."""
    total = describe(np.concatenate(list(domains.values())))
    parts = {name: describe(lengths) for name, lengths in domains.items()}
    for part in parts.values():
        part["share"] = part["tokens"] / total["tokens"] if total["tokens"] else 0.0
    return {ALL: total, "domains": parts}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        pairs = list(zip(cells, widths, strict=True))
        cells = [pairs[0][0].ljust(pairs[0][1]), *(cell.rjust(n) for cell, n in pairs[1:])]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * widths[0], *("-" * (n - 1) + ":" for n in widths[1:])]
    return "\n".join([line(head), line(rule), *map(line, rows)]) + "\n"


def markdown(summary: dict[str, Any]) -> str:
    """Two Markdown tables: the domains, and the histogram of lengths."""
    everything = {**summary["domains"], ALL: {**summary[ALL], "share": 1.0}}
    head = ["domain", "documents", "tokens", "share", "mean", "median", "max"]
    head += [f"beyond {at:,}" for at in POSITIONS]
    rows = []
    for name, part in everything.items():
        sizes = [part["documents"], part["tokens"]]
        lengths = [round(part["mean"]), round(part["median"]), part["max"]]
        cells = [f"{n:,}" for n in sizes] + [f"{part['share']:.1%}"] + [f"{n:,}" for n in lengths]
        rows.append([name, *cells, *(f"{share:.1%}" for share in part["beyond"].values())])
    total = summary[ALL]
    buckets = [
        [
            f"{row['from']:,} to {2 * row['from'] - 1:,}",
            f"{row['documents']:,}",
            f"{row['documents'] / total['documents']:.1%}",
            f"{row['tokens']:,}",
            f"{row['tokens'] / total['tokens']:.1%}",
        ]
        for row in total["histogram"]
    ]
    lengths_head = ["length, tokens", "documents", "of all", "tokens", "of all"]
    return _table(head, rows) + "\n" + _table(lengths_head, buckets)


def draw(domains: dict[str, Lengths], summary: dict[str, Any], path: Path) -> None:
    """Draws tokens by document length, stacked by domain, and the share beyond each position.

    Args:
        domains: lengths by domain.
        summary: the result of `summarise` for them.
        path: PNG file to write.
    """
    figure = Figure(figsize=(11.0, 4.2), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    powers = [row["from"].bit_length() - 1 for row in summary[ALL]["histogram"]]
    first, last = min(powers, default=0), max(powers, default=0)
    base = np.zeros(last - first + 1)
    longest = max(summary[ALL]["max"], 2)
    positions = np.unique(np.geomspace(1, longest, 200).astype(np.int64))
    for i, (name, lengths) in enumerate(domains.items()):
        colour = COLOURS[i % len(COLOURS)]
        heights = np.zeros(len(base))
        for row in summary["domains"][name]["histogram"]:
            heights[row["from"].bit_length() - 1 - first] = row["tokens"] / 1e6
        bars.bar(range(first, last + 1), heights, bottom=base, color=colour, label=name)
        base += heights
        shares = [100 * share for share in beyond(lengths, positions)]
        curves.plot(positions, shares, color=colour, linewidth=1.6, label=name)
    bars.set_xticks(range(first, last + 1), [f"{1 << p:,}" for p in range(first, last + 1)])
    for label in bars.get_xticklabels():
        label.set(rotation=45, ha="right", rotation_mode="anchor")
    bars.set_ylim(0, 1.05 * float(base.max()) or 1)
    bars.set_xlabel("length of the document, tokens (lower end of each bar)")
    bars.set_ylabel("million tokens")
    for at in POSITIONS:
        if at < longest:
            curves.vlines(at, 0, 101, color="#666666", linestyle=":", linewidth=1)
            curves.text(at, 103, f"{at // 1024}K", ha="center", fontsize=8)
    curves.set_xscale("log", base=2)
    curves.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    curves.set_xlabel("position in the document, tokens")
    curves.set_ylabel("tokens at this position or later, %")
    curves.set_ylim(0, 108)
    for axes in (bars, curves):
        axes.grid(True, alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=HELP, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "stores", metavar="STORE", type=Path, nargs="+",
        help="token store, or folder with one store per domain",
    )  # fmt: skip
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="directory to write stats.md, stats.json and stats.png to",
    )
    args = parser.parse_args(argv)
    try:
        domains = find_stores(args.stores)
        summary = summarise(domains)
        text = markdown(summary)
        if args.output is not None:
            args.output.mkdir(parents=True, exist_ok=True)
            (args.output / "stats.md").write_text(text, encoding="utf-8")
            (args.output / "stats.json").write_text(json.dumps(summary, indent=2) + "\n")
            draw(domains, summary, args.output / "stats.png")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{args.output}: cannot write there ({error.strerror})", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
