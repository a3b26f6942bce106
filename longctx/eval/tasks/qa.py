"""Questions answered from k passages: exact match, sub-EM and F1 with SQuAD's normalisation.

Passages are the k best by BM25 or by given scores; controls put the gold passages first, in the
middle or last among the best others, alone, or leave them out. Greedy decoding of a few tokens, and
the answer ends at a newline. A prompt that does not fit is an error before anything is asked; a
passage wider than the encoder's window becomes several contexts, and is counted.
Costs one prefill a prompt and some decoding steps, a prompt at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from longctx.config.typed import choice, positive
from longctx.errors import UserError
from longctx.eval.answers import contained, exact, f1, interval, wilson
from longctx.eval.evaluation import Evaluation, distinct
from longctx.eval.figures import SIZE, legend, look, new_axes, save
from longctx.eval.headline import Column, bounded, cells_of, shared
from longctx.eval.qa_prompts import Pool, Prompt, Question, Ranked, Writer, digest, rank, read
from longctx.eval.results import Results, result_of
from longctx.eval.score import context_window, evaluating, greedy, has_encoder
from longctx.eval.subject import Subject
from longctx.eval.tables import image, percent, table
from longctx.eval.task import Found, Sample, Task, TaskResult

RANKINGS = ("bm25", "given")
PLACES = ("first", "middle", "last")
QA_SETTINGS = ("retrieved", *PLACES, "gold_only", "no_gold")
SCORES = {"em": "EM", "sub_em": "sub-EM", "f1": "F1"}
DASHES = {"retrieved": "-", "first": "--", "middle": "-.", "last": ":", "no_gold": "-"}


@dataclass(frozen=True)
class Qa(Task):
    """Questions over k passages, and where the gold one stands.

    Args:
        data: JSON file of questions and passages: SQuAD's layout, HotpotQA's, or a list of
            `{question, answers, ctxs: [{title, text, score}]}`.
        ranking: `bm25` (over all passages of the file) `| given` (its scores).
        passages: numbers of passages, k.
        settings: which passages: `retrieved` (the k best), gold ones at the `first | middle |
            last` place among the best others, `gold_only`, `no_gold`; one or more.
        decoder_passages: of a model with an encoder, the decoder reads this many passages and the
            encoder the rest.
        demonstrations: solved examples in front, each with one passage.
        questions: most questions asked. None: all.
        new_tokens: most tokens of an answer.
        window: tokens that prompt and answer may take. None: the window the model claims.
    """

    place: ClassVar[int] = 100

    data: str | None = None
    ranking: str = "bm25"
    passages: list[int] = field(default_factory=lambda: [2, 5, 10])
    settings: list[str] = field(default_factory=lambda: list(QA_SETTINGS))
    decoder_passages: int = 2
    demonstrations: int = 2
    questions: int | None = 50
    new_tokens: int = 25
    window: int | None = None

    def __post_init__(self) -> None:
        choice(self.ranking, RANKINGS, "qa.ranking")
        for setting in self.settings:
            choice(setting, QA_SETTINGS, "qa.settings")
        if not self.settings:
            raise UserError(f"qa.settings=[] must name at least one of {', '.join(QA_SETTINGS)}")
        distinct(self.passages, "qa.passages", 1)
        for key in ("questions", "new_tokens", "window"):
            if (value := getattr(self, key)) is not None:
                positive(value, f"qa.{key}")
        for key in ("decoder_passages", "demonstrations"):
            if getattr(self, key) < 0:
                raise UserError(f"qa.{key}={getattr(self, key)} must be at least 0")

    @property
    def longest(self) -> int | None:
        """The window asked for."""
        return self.window

    def check(self, cfg: Evaluation) -> None:
        """It needs a file of questions."""
        if self.data is None:
            raise UserError(
                "tasks=[qa] needs qa.data=FILE, JSON (bash data_prep/qa_data.sh has some)"
            )

    def inputs(self, cfg: Evaluation) -> dict[str, Any]:
        """The file's content, and the seed."""
        return {"data": digest(self.data or ""), "seed": cfg.seed}

    def run(self, cfg: Evaluation, subject: Subject) -> TaskResult:
        """Every setting with every k: one row each, and one record a prompt."""
        pool = read(self.data or "")
        shown, asked = choose(pool, self, cfg.seed)
        ranked = rank(pool, asked, self.ranking, max(self.passages))
        model = subject.model
        in_decoder = self.decoder_passages if has_encoder(model) else None
        bos = subject.tokenizer.bos_token_id
        writer = Writer(pool, shown, in_decoder, subject.encode, bos, context_window(model))
        exam = Exam(self, writer, asked, ranked, cfg.seed)
        check_fit(exam, self.window or model.config.max_position_embeddings)
        records = ask(exam, subject)
        rows = []
        for cell in cells(self):
            inside = [r for r in records if (r["setting"], r["k"]) == (cell.setting, cell.k)]
            rows.append(summary(cell, inside))
        return {
            "pool": len(pool.passages),
            "ranking": self.ranking,
            "demonstrations": self.demonstrations,
            "contexts_read_by": "decoder" if in_decoder is None else "encoder",
            "decoder_passages": in_decoder,
            "truncated_prompts": 0,
            "cells": rows,
        }, records

    @classmethod
    def section(cls, found: Found, out: Path) -> Iterator[str]:
        """A row a model, setting and k."""
        own = found[0][1]
        yield from ("## Questions over passages", "")
        yield (
            f"{own['cells'][0]['questions']} questions, {own['pool']:,} passages ranked by "
            f"{own['ranking']}, demonstrations: {own['demonstrations']}; greedy, an answer ends at "
            "a newline; per cent with 95% intervals (Wilson for EM and sub-EM, bootstrap for F1); "
            "gold found: questions all of whose gold passages are among the k; prompts truncated: "
            "0."
        )
        yield ""
        rows = []
        for model, result in found:
            for row in result["cells"]:
                tokens = f"{row['tokens'][0]:,} to {row['tokens'][1]:,}"
                if row["context_tokens"][1]:
                    low, high = row["context_tokens"]
                    tokens += f" + {low:,} to {high:,} encoded"
                if row.get("passages_cut"):
                    tokens += f", {row['passages_cut']:,} passages in several contexts"
                cells = ["" if row["k"] is None else str(row["k"])]
                cells += [percent(row[key], row[f"{key}_interval"]) for key in SCORES]
                cells += [percent(row["gold_found"]), tokens]
                rows.append([model["label"], row["setting"], *cells])
        head = ["model", "passages", "k", *SCORES.values(), "gold found", "prompt tokens"]
        yield from table(head, rows)
        figure = qa_figure([m for m, _ in found], out / "qa.png")
        yield from image("Questions over k passages", figure)

    @classmethod
    def columns(cls, models: Sequence[Results]) -> Iterator[Column]:
        """Exact match over the most retrieved passages."""
        rows = []
        for m in models:
            own = [c for c in cells_of(m, cls.name) if c["setting"] == "retrieved"]
            rows.append({c["k"]: bounded(c, "em") for c in own})
        for k in shared(rows)[-1:]:
            yield Column(f"QA over {k} passages, EM %", [r.get(k) for r in rows], percent)


@dataclass(frozen=True)
class Cell:
    """One row of the result: which passages, and how many; None with `gold_only`."""

    setting: str
    k: int | None


def cells(own: Qa) -> list[Cell]:
    """All rows asked for."""
    return [
        Cell(setting, k)
        for setting in own.settings
        for k in ((None,) if setting == "gold_only" else sorted(own.passages))
    ]


def choose(pool: Pool, own: Qa, seed: int) -> tuple[list[Question], list[Question]]:
    """Demonstrations, and questions that share no passage with them.

    Args:
        pool: the questions of a file.
        own: how many of both.
        seed: of the draw.

    Raises:
        UserError: if there are too few.
    """
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(pool.questions))
    drawn = [pool.questions[i] for i in order]
    shown = [q for q in drawn if q.gold][: own.demonstrations]
    used = {place for q in shown for place in q.gold}
    names = {q.identity for q in shown}
    needs_gold = any(setting != "retrieved" for setting in own.settings)
    asked = [
        q
        for q in drawn
        if q.identity not in names and not used & set(q.gold) and (q.gold or not needs_gold)
    ]
    if len(shown) < own.demonstrations or not asked:
        raise UserError(
            f"qa.data={own.data} has too few questions with a passage that answers them for "
            f"qa.demonstrations={own.demonstrations} and one question more"
        )
    return shown, asked[: own.questions]


def passages_of(cell: Cell, question: Question, ranked: Ranked) -> tuple[int, ...]:
    """Which passages are read, in order.

    Args:
        cell: setting and k.
        question: with its gold passages.
        ranked: the best others.

    Raises:
        UserError: if k does not hold the gold passages, or there are too few others.
    """
    gold, k = question.gold, cell.k
    if k is None:
        return gold
    if cell.setting in PLACES and k < len(gold):
        raise UserError(
            f"question {question.identity} has {len(gold)} gold passages, and qa.passages={k} "
            f"holds no more than {k}: larger qa.passages, or leave out qa.settings={cell.setting}"
        )
    needed = k - len(gold) if cell.setting in PLACES else k
    found = (ranked.best if cell.setting == "retrieved" else ranked.others)[:needed]
    if len(found) < needed:
        raise UserError(
            f"question {question.identity} has {len(found)} passages to choose from in "
            f"qa.settings={cell.setting}, and qa.passages={k} needs {needed}"
        )
    if cell.setting not in PLACES:
        return found
    at = {"first": 0, "middle": needed // 2, "last": needed}[cell.setting]
    return (*found[:at], *gold, *found[at:])


@dataclass(frozen=True)
class Exam:
    """Everything that is asked.

    Args:
        own: settings.
        writer: makes the prompts.
        questions: asked in every cell.
        ranked: passages for each of them.
        seed: of the draw, for the records.
    """

    own: Qa
    writer: Writer
    questions: Sequence[Question]
    ranked: Sequence[Ranked]
    seed: int

    def __len__(self) -> int:
        """How many prompts."""
        return len(cells(self.own)) * len(self.questions)

    def prompts(self) -> Iterator[tuple[Cell, int, Prompt]]:
        """Cell by cell: (cell, number of the question, prompt); written as they are taken."""
        for cell in cells(self.own):
            for i, question in enumerate(self.questions):
                passages = passages_of(cell, question, self.ranked[i])
                yield cell, i, self.writer.write(question, passages)


def check_fit(exam: Exam, window: int) -> None:
    """Writes every prompt once, so that one that is too long is found before anything is asked.

    Args:
        exam: prompts.
        window: tokens for prompt and answer.

    Raises:
        UserError: at the first that does not fit, which it names. Nothing is ever truncated.
    """
    answer = exam.own.new_tokens
    for cell, i, prompt in exam.prompts():
        where = f"qa: question {exam.questions[i].identity}, {cell.setting}"
        where += f" with {len(prompt.passages)} passages"
        if len(prompt.tokens) + answer > window:
            raise UserError(
                f"{where}: its prompt of {len(prompt.tokens):,} tokens and {answer} for the "
                f"answer exceed the window of {window:,}: fewer qa.passages, or a larger "
                "qa.window if the model can do more than it claims"
            )


def ask(exam: Exam, subject: Subject) -> list[Sample]:
    """Answers every prompt, one record each.

    Args:
        exam: prompts.
        subject: the model, with transformers' `generate`, and its tokenizer.
    """
    model = subject.model

    def answer(asked: tuple[Cell, int, Prompt]) -> Sample:
        cell, i, prompt = asked
        new = greedy(model, prompt.tokens, exam.own.new_tokens, prompt.contexts)
        return _record(exam, cell, i, prompt, subject.decode(new).split("\n")[0].strip())

    with evaluating(model):
        return subject.journal.each("qa", exam.prompts(), answer, total=len(exam))


def _record(exam: Exam, cell: Cell, i: int, prompt: Prompt, answer: str) -> Sample:
    question = exam.questions[i]
    return {
        "task": "qa",
        "setting": cell.setting,
        "k": cell.k,
        "index": i,
        "seed": exam.seed,
        "id": question.identity,
        "question": question.text,
        "answers": list(question.answers),
        "gold": list(question.gold),
        "passages": list(prompt.passages),
        "in_decoder": prompt.in_decoder,
        "gold_spans": [list(span) for span in prompt.gold_spans],
        "tokens": len(prompt.tokens),
        "context_tokens": sum(map(len, prompt.contexts)),
        "passages_cut": prompt.cut,
        "prediction": answer,
        "em": exact(answer, question.answers),
        "sub_em": contained(answer, question.answers),
        "f1": f1(answer, question.answers),
        # One prompt of each cell in full: the others differ in the passages named above.
        "prompt": prompt.text if i == 0 else None,
    }


def summary(cell: Cell, records: Sequence[Sample]) -> dict[str, Any]:
    """The result row of a cell; intervals are 95%.

    Args:
        cell: setting and k.
        records: of that cell, at least one.
    """
    n = len(records)
    row: dict[str, Any] = {"setting": cell.setting, "k": cell.k, "questions": n}
    for key in ("em", "sub_em"):
        right = sum(r[key] for r in records)
        row |= {key: right / n, f"{key}_interval": list(wilson(right, n))}
    scores = [r["f1"] for r in records]
    row |= {"f1": sum(scores) / n, "f1_interval": list(interval(scores))}
    complete = sum(bool(r["gold"]) and set(r["gold"]) <= set(r["passages"]) for r in records)
    row["gold_found"] = complete / n
    row["passages_cut"] = sum(r["passages_cut"] for r in records)
    for key in ("tokens", "context_tokens", "in_decoder"):
        row[key] = [min(r[key] for r in records), max(r[key] for r in records)]
    return row


def qa_figure(models: Sequence[Results], path: Path) -> str:
    """Exact match against k; a colour per model, a dash per setting, level lines for gold only.

    Args:
        models: contents of `results.json` that hold the task.
        path: PNG to write.

    Returns:
        The file's name.
    """
    figure, axes = new_axes(*SIZE)
    ticks: set[int] = set()
    for i, model in enumerate(models):
        own, cells = look(model, i), (result_of(model, "qa") or {})["cells"]
        for setting, dashes in DASHES.items():
            line = sorted((c for c in cells if c["setting"] == setting), key=lambda c: int(c["k"]))
            if not line:
                continue
            em = [100 * c["em"] for c in line]
            ends = [[100 * x for x in c["em_interval"]] for c in line]
            below = [y - low for y, (low, _) in zip(em, ends, strict=True)]
            above = [high - y for y, (_, high) in zip(em, ends, strict=True)]
            axes.errorbar(
                [c["k"] for c in line],
                em,
                yerr=[below, above],
                label=f"{model['label']}, {_named(setting)}",
                **own,
                alpha=0.45 if setting == "no_gold" else 1.0,
                linestyle=dashes,
                markersize=4,
                linewidth=1.4,
                capsize=2,
            )
            ticks |= {c["k"] for c in line}
        for cell in (c for c in cells if c["setting"] == "gold_only"):
            name = f"{model['label']}, gold only"
            axes.axhline(100 * cell["em"], color=own["color"], linewidth=0.8, label=name)
    axes.set_xticks(sorted(ticks), [f"{k:,}" for k in sorted(ticks)])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("passages, k")
    axes.set_ylabel("exact match, %")
    axes.set_title("Questions over k passages, with 95% intervals", fontsize=11)
    legend(figure)
    return save(figure, path)


def _named(setting: str) -> str:
    return f"gold {setting}" if setting in PLACES else setting.replace("_", " ")
