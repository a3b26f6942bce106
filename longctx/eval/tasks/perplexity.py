"""Perplexity of held-out text by length, under the protocols of `longctx/eval/protocols.py`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from longctx.config.typed import choice, positive
from longctx.data.store import Store
from longctx.errors import UserError
from longctx.eval.evaluation import Evaluation
from longctx.eval.figures import (
    SIZE,
    legend,
    length_axis,
    look,
    new_axes,
    save,
    window_lines,
)
from longctx.eval.headline import Column, Z, at_lengths
from longctx.eval.protocols import (
    Text,
    single_pass_buckets,
    sliding_new_tokens,
    token_matched,
    whole_window,
)
from longctx.eval.results import Results, protocols_of
from longctx.eval.scored_windows import choose_documents
from longctx.eval.subject import Subject, digest_of, open_store
from longctx.eval.tables import image, length_table, plus_minus
from longctx.eval.task import Found, Task, TaskResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOTES = {
    "sliding_new_tokens": "A window of the given width moves by the stride, only its new tokens "
    "are scored",
    "whole_window": "A window of the given width moves by the stride over all documents as one "
    "stream, all of its tokens are scored each time",
    "single_pass_buckets": "One forward over the first tokens of each document, all scored; the "
    "figure splits the longest by position. Bucket gain: the largest position, in tokens, whose "
    "loss is still two standard errors below that of half as far",
    "token_matched": "The same target tokens in every column, only the context before them differs",
}
# For the first table: of the protocols that ran, the one whose lengths compare best.
PREFERRED = ("token_matched", "single_pass_buckets", "sliding_new_tokens", "whole_window")
DODGE = 0.03  # octaves between the points of two models, so that error bars do not overlap
LOG_FROM = 10  # a log y axis above this ratio of largest to smallest perplexity
CLIP_FROM = 100  # above this ratio perplexities are drawn at the edge, with an arrow


@dataclass(frozen=True)
class Perplexity(Task):
    """Loss on held-out text at each length, under named protocols.

    Args:
        protocols: `sliding_new_tokens | whole_window | single_pass_buckets | token_matched`, one
            or more; `cepe_tail` is one of the task `contexts`.
        stride: tokens that the window of the first two moves; the first scores just those.
        target_tokens: tokens scored at the end of each token-matched window.
        windows: token-matched windows per document, at most.
        max_documents: documents scored, evenly spaced over the store. None: all long enough.
        document_tokens: documents are cut to this length for the first two, but never below
            the longest of `lengths`. None: whole documents.
    """

    place: ClassVar[int] = 10
    by_length: ClassVar[bool] = True

    protocols: list[str] = field(
        default_factory=lambda: ["sliding_new_tokens", "single_pass_buckets", "token_matched"]
    )
    stride: int = 64
    target_tokens: int = 64
    windows: int = 4
    max_documents: int | None = 8
    document_tokens: int | None = 4096

    def __post_init__(self) -> None:
        for protocol in self.protocols:
            choice(protocol, tuple(NOTES), "perplexity.protocols")
        for key in ("stride", "target_tokens", "windows"):
            positive(getattr(self, key), f"perplexity.{key}")
        for key in ("max_documents", "document_tokens"):
            if (value := getattr(self, key)) is not None:
                positive(value, f"perplexity.{key}")

    @property
    def of_a_store(self) -> bool:
        """Every protocol scores it."""
        return True

    @property
    def one_pass(self) -> bool:
        """No protocol decodes."""
        return True

    def check(self, cfg: Evaluation) -> None:
        """Every window must hold more tokens than are scored at its end."""
        scored = {"stride": "sliding_new_tokens", "target_tokens": "token_matched"}
        for key, protocol in scored.items():
            tokens = getattr(self, key)
            if protocol in self.protocols and tokens >= min(cfg.lengths):
                raise UserError(
                    f"perplexity.{key}={tokens} must be shorter than every window of "
                    f"lengths={list(cfg.lengths)}"
                )

    def _chosen(self, cfg: Evaluation) -> tuple[Store, list[int], int]:
        """The store, the documents to score, and how many were too short."""
        store = open_store(cfg)
        longest = max(cfg.lengths)
        return store, *choose_documents(store, longest, self.max_documents, str(store.path))

    def inputs(self, cfg: Evaluation) -> dict[str, Any]:
        """The store's content; nothing is drawn at random."""
        return {"held_out": digest_of(self._chosen(cfg)[0])}

    def run(self, cfg: Evaluation, subject: Subject) -> TaskResult:
        """Results by protocol, a row a length; there are no records of single windows."""
        store, chosen, skipped = self._chosen(cfg)
        lengths, model = sorted(cfg.lengths), subject.model
        text = Text(store, chosen, cfg.batch_tokens, subject.journal)
        cut = self.document_tokens
        measure: dict[str, Callable[[], dict[str, Any]]] = {
            "sliding_new_tokens": lambda: sliding_new_tokens(
                model, text, lengths, self.stride, cut
            ),
            "whole_window": lambda: whole_window(model, text, lengths, self.stride, cut),
            "single_pass_buckets": lambda: single_pass_buckets(model, text, lengths),
            "token_matched": lambda: token_matched(
                model, text, lengths, self.target_tokens, self.windows
            ),
        }
        common = {"bos": "document_start", "documents": len(chosen), "skipped": skipped}
        return {"protocols": {name: common | measure[name]() for name in self.protocols}}, []

    @classmethod
    def section(cls, found: Found, out: Path) -> Iterator[str]:
        """One table and one figure a protocol."""
        models = [model for model, _ in found]
        for name in dict.fromkeys(name for model in models for name in protocols_of(model)):
            having = [m for m in models if name in protocols_of(m)]
            own = protocols_of(having[0])[name]
            facts = ", ".join(
                f"{k.replace('_', ' ')} {own[k]}" for k in ("stride", "target_tokens") if k in own
            )
            yield f"## Perplexity, `{name}`"
            yield ""
            yield f"{NOTES[name]}{f' ({facts})' if facts else ''}."
            yield (
                f"{own['documents']} documents, {own['skipped']} shorter ones skipped, "
                f"{own['rows'][-1]['tokens']:,} tokens scored at the last length; "
                f"columns: tokens of context; BOS at the {own['bos'].replace('_', ' ')}; ± is one "
                "standard error."
            )
            yield ""
            rows = {m["label"]: _row(protocols_of(m)[name]["rows"]) for m in having}
            more = None
            if name == "single_pass_buckets":
                more = ("bucket gain", {m["label"]: _bucket_gain(m) for m in having})
            yield from length_table(rows, more)
            figure = perplexity_figure(models, name, out / f"perplexity_{name}.png")
            against = "position" if more else "length"
            yield from image(f"`{name}` against {against}; bars: one standard error", figure)

    @classmethod
    def columns(cls, models: Sequence[Results]) -> Iterator[Column]:
        """The perplexity of one protocol."""
        names = dict.fromkeys(n for m in models for n in protocols_of(m))
        name = next((n for n in PREFERRED if n in names), next(iter(names), ""))
        rows = [
            {
                r["length"]: (r["perplexity"], Z * (r["perplexity_se"] or 0))
                for r in protocols_of(m).get(name, {"rows": []})["rows"]
            }
            for m in models
        ]
        title = f"perplexity at {{at}}, `{name}`"
        yield from at_lengths(models, rows, title, lambda v: f"{v:.2f}", rising=False)


def _row(rows: Sequence[dict[str, Any]]) -> dict[int, str]:
    return {r["length"]: plus_minus(r["perplexity"], r["perplexity_se"], 2) for r in rows}


def _bucket_gain(model: Results) -> str:
    rows = protocols_of(model)["single_pass_buckets"]["rows"]
    return f"{max(rows, key=lambda row: int(row['length']))['bucket_gain']:,}"


def _curve(results: Results, protocol: str) -> list[tuple[int, float, float]]:
    """(length, perplexity, its standard error) of one model under one protocol."""
    rows = protocols_of(results)[protocol]["rows"]
    if protocol == "single_pass_buckets":
        longest = max(rows, key=lambda row: int(row["length"]))
        return [(b["end"], b["perplexity"], b["perplexity_se"] or 0) for b in longest["buckets"]]
    return [(r["length"], r["perplexity"], r["perplexity_se"] or 0) for r in rows]


def perplexity_figure(models: Sequence[Results], protocol: str, path: Path) -> str:
    """Perplexity against context length (or position), a line per model.

    Args:
        models: contents of `results.json`, those that lack the protocol are left out.
        protocol: its name, printed in the title.
        path: PNG to write.

    Returns:
        The file's name.
    """
    figure, axes = new_axes(*SIZE)
    curves = [_curve(m, protocol) if protocol in protocols_of(m) else [] for m in models]
    values = [y for curve in curves for _, y, _ in curve]
    limit = CLIP_FROM * min(values)
    for i, model in enumerate(models):
        if not curves[i]:
            continue
        lengths, perplexity, error = zip(*sorted(curves[i]), strict=True)
        shown = [min(y, limit) for y in perplexity]
        row, count = model.get("place", i), model.get("models", len(models))
        beside = 2 ** (DODGE * (row - (count - 1) / 2))
        axes.errorbar(
            [x * beside for x in lengths],
            shown,
            yerr=[e if y <= limit else 0 for y, e in zip(perplexity, error, strict=True)],
            label=model["label"],
            **look(model, i),
            markersize=5,
            linewidth=1.6,
            capsize=2,
        )
        _arrows(
            axes,
            [x * beside for x, y in zip(lengths, perplexity, strict=True) if y > limit],
            limit,
            look(model, i)["color"],
        )
    if max(values) > limit:
        axes.plot([], [], "k^", markerfacecolor="none", label=f"clipped, above {limit:,.0f}")
    window_lines(axes, [m for m in models if protocol in protocols_of(m)])
    by_position = protocol == "single_pass_buckets"
    length_axis(
        axes,
        sorted({x for curve in curves for x, _, _ in curve}),
        "position (end of bucket), tokens" if by_position else "context, tokens",
    )
    if max(values) > LOG_FROM * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}")
    axes.set_ylabel("perplexity")
    axes.set_title(f"Perplexity, protocol {protocol}", fontsize=11)
    legend(figure)
    return save(figure, path)


def _arrows(axes: "Axes", lengths: Sequence[float], limit: float, colour: str) -> None:
    """Marks values that were clipped."""
    for x in lengths:
        axes.plot(x, limit, "^", markersize=11, markerfacecolor="none", markeredgecolor=colour)
