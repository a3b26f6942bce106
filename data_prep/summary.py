"""Counts what was read, kept and dropped, and why: as a table, JSON and a figure."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FATES = ("kept", "too_short", "duplicate")  # of a tokenised document
KEPT, TOO_SHORT, DUPLICATE = range(3)
UNTOKENIZED = ("evaluation", "too_few_bytes")  # reasons that apply before tokenising
SHOWN = 10  # unreadable records that are listed
BINS = 64  # bin k: 2^k to 2^(k+1) - 1 tokens
COLOURS = ("#56B4E9", "#0072B2")  # Okabe-Ito: before, after


@dataclass
class Tally:
    """Counts of one domain.

    Args:
        documents: by fate or reason.
        tokens: by fate.
        before: `[2 BINS]` documents and tokens by length, for all that were tokenised.
        after: `[2 BINS]` the same for those that were kept.
    """

    documents: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    before: NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, BINS), np.int64))
    after: NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, BINS), np.int64))

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.documents + other.documents, self.tokens + other.tokens,
            self.before + other.before, self.after + other.after,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """JSON-able counts."""
        used = np.flatnonzero(self.before[0])
        bins = slice(0, int(used[-1]) + 1 if len(used) else 0)
        return {
            "documents": {"in": self.documents.total()} | self.documents,
            "tokens": {"in": self.tokens.total()} | self.tokens,
            "lengths": {
                "from": [1 << k for k in range(BINS)][bins],
                "before": self.before[0, bins].tolist(),
                "after": self.after[0, bins].tolist(),
                "tokens_before": self.before[1, bins].tolist(),
                "tokens_after": self.after[1, bins].tolist(),
            },
        }


@dataclass
class Summary:
    """Counts of a whole run.

    Args:
        identity: hash that identifies the result.
        rules: the rules that were applied.
        records: all records of the input, readable or not.
        other_domain: records of domains that were not requested.
        bad: records that cannot be read, by kind.
        shown: places of the first of them; truncated archives come first.
        domains: counts by domain.
    """

    identity: str
    rules: dict[str, Any]
    records: int = 0
    other_domain: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    shown: list[dict[str, Any]] = field(default_factory=list)
    domains: dict[str, Tally] = field(default_factory=dict)

    def add_report(self, report: dict[str, Any]) -> None:
        """Adds the counts that a task made before tokenising."""
        self.records += report["records"]
        self.other_domain += report["other_domain"]
        self.bad.update(report["counts"]["bad"])
        for hit in report["hits"]:
            self._tally(hit["domain"]).documents["evaluation"] += 1
        for name, count in report["counts"]["too_few_bytes"].items():
            self._tally(name).documents["too_few_bytes"] += count
        for name in report["domains"]:
            self._tally(name)

    def show(self, bad: dict[str, Any]) -> None:
        """Remembers the place of an unreadable record."""
        archives = [x for x in self.shown if x["kind"] == "truncated_archive"]
        others = [x for x in self.shown if x["kind"] != "truncated_archive"]
        (archives if bad["kind"] == "truncated_archive" else others).append(bad)
        self.shown = (archives + others)[: max(SHOWN, len(archives))]

    def add_documents(
        self, names: list[str], domains: NDArray[Any], lengths: NDArray[Any], fates: NDArray[Any]
    ) -> None:
        """Adds the tokenised documents of a shard.

        Args:
            names: domains by index.
            domains: `[n]` index in `names`.
            lengths: `[n]` tokens.
            fates: `[n]` index in `FATES`.
        """
        bins = np.frexp(lengths)[1] - 1  # exact, as a logarithm would not be
        for index, name in enumerate(names):
            tally = self._tally(name)
            here = domains == index
            for code, fate in enumerate(FATES):
                chosen = here & (fates == code)
                if chosen.any():
                    tally.documents[fate] += int(chosen.sum())
                    tally.tokens[fate] += int(lengths[chosen].sum())
            for counts, chosen in ((tally.before, here), (tally.after, here & (fates == KEPT))):
                np.add.at(counts[0], bins[chosen], 1)
                np.add.at(counts[1], bins[chosen], lengths[chosen])

    def total(self) -> Tally:
        """Counts over all domains."""
        return sum(self.domains.values(), Tally())

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; the same for the same input and rules."""
        return {
            "identity": self.identity,
            "rules": self.rules,
            "records": self.records,
            "other_domain": self.other_domain,
            "bad": {"kinds": dict(self.bad), "first": self.shown},
            "domains": {name: tally.as_dict() for name, tally in self.domains.items()},
            "total": self.total().as_dict(),
        }

    def _tally(self, name: str) -> Tally:
        return self.domains.setdefault(name, Tally())


def table(summary: dict[str, Any]) -> str:
    """The summary as text for a terminal.

    Args:
        summary: the result of `Summary.as_dict`.
    """
    reasons = [*UNTOKENIZED, *FATES[1:]]
    found = summary["total"]["documents"]
    reasons = [reason for reason in reasons if found.get(reason)]
    header = ["domain", "documents", *reasons, "kept", "tokens", "kept", "share"]
    rows = [header]
    for name, part in [*sorted(summary["domains"].items()), ("all", summary["total"])]:
        documents, tokens = part["documents"], part["tokens"]
        counts = [documents["in"], *(documents.get(key, 0) for key in [*reasons, "kept"])]
        counts += [tokens["in"], tokens.get("kept", 0)]
        share = tokens.get("kept", 0) / max(1, tokens["in"])
        rows.append([name, *(f"{n:,}" for n in counts), f"{share:.1%}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    lines.insert(-1, "-" * len(lines[0]))
    return "\n".join([*lines, "", *_histogram(summary["total"]["lengths"]), *_notes(summary)])


def _histogram(lengths: dict[str, list[int]]) -> list[str]:
    """One line per power of two that occurs: documents before and after."""
    lines = [f"{'tokens':>23}  {'before':>11}  {'after':>11}"]
    for start, before, after in zip(
        *(lengths[x] for x in ("from", "before", "after")), strict=True
    ):
        if before:
            span = f"{start:,} to {2 * start - 1:,}"
            lines.append(f"{span:>23}  {before:>11,}  {after:>11,}")
    return lines


def _notes(summary: dict[str, Any]) -> list[str]:
    lines = []
    if summary["other_domain"]:
        lines.append(f"{summary['other_domain']:,} records of other domains were skipped")
    kinds = summary["bad"]["kinds"]
    if kinds:
        counts = ", ".join(f"{n:,} {kind}" for kind, n in sorted(kinds.items()))
        lines.append(f"{sum(kinds.values()):,} records cannot be read: {counts}")
    lines += [
        f"  {bad['file']}:{bad['line']}: {bad['kind']} ({bad['note']})"
        for bad in summary["bad"]["first"]
    ]
    return ["", *lines] if lines else []


def draw(summary: Summary, path: Path) -> None:
    """Draws lengths before and after filtering, in documents and in tokens, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    total = summary.total()
    used = np.flatnonzero(total.before[0])
    bins = np.arange(used[0], used[-1] + 1) if len(used) else np.arange(1)
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, row, label in zip(
        figure.subplots(1, 2), (0, 1), ("documents", "tokens"), strict=True
    ):
        axes.bar(bins, total.before[row, bins], 0.9, color=COLOURS[0], label="before")
        axes.bar(bins, total.after[row, bins], 0.6, color=COLOURS[1], label="kept")
        axes.set_xticks(bins, [f"{1 << k:,}" for k in bins], rotation=45, ha="right")
        axes.set_xlabel("document length, tokens (lower end of each bar)")
        axes.set_ylabel(label)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.grid(True, axis="y", alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
