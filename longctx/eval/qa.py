"""Questions answered from k passages: exact match, sub-EM and F1 with SQuAD's normalisation.

Passages are the k best by BM25 or by given scores; controls put the gold passages first, in the
middle or last among the best others, alone, or leave them out. Greedy decoding of a few tokens, and
the answer ends at a newline. A prompt that does not fit is an error before anything is asked; a
passage wider than the encoder's window becomes several contexts, and is counted.
Costs one prefill a prompt and some decoding steps, a prompt at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from longctx.errors import UserError
from longctx.eval.answers import contained, exact, f1, interval, wilson
from longctx.eval.config import EvalConfig
from longctx.eval.config_contexts import QaConfig
from longctx.eval.context import context_window, greedy, has_encoder
from longctx.eval.qa_data import Question, Ranked, digest, rank, read
from longctx.eval.qa_prompts import Cell, Prompt, Writer, cells, choose, passages_of
from longctx.eval.score import evaluating
from longctx.eval.subject import Sample, Subject, TaskResult


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

    own: QaConfig
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
    """Writes every prompt once.

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


def inputs(cfg: EvalConfig) -> dict[str, Any]:
    """What the numbers depend on beside the settings.

    Raises:
        UserError: if there is no such file.
    """
    return {"data": digest(cfg.qa.data or ""), "seed": cfg.seed}


def run(cfg: EvalConfig, subject: Subject) -> TaskResult:
    """The task: every setting with every k.

    Args:
        cfg: the evaluation.
        subject: the model under test.

    Returns:
        The result (`cells`: one row each) and one record a prompt.

    Raises:
        UserError: if the file cannot be used as asked, or a prompt does not fit.
    """
    own = cfg.qa
    pool = read(own.data or "")
    shown, asked = choose(pool, own, cfg.seed)
    ranked = rank(pool, asked, own.ranking, max(own.passages))
    model = subject.model
    in_decoder = own.decoder_passages if has_encoder(model) else None
    bos = subject.tokenizer.bos_token_id
    writer = Writer(pool, shown, in_decoder, subject.encode, bos, context_window(model))
    exam = Exam(own, writer, asked, ranked, cfg.seed)
    check_fit(exam, own.window or model.config.max_position_embeddings)
    records = ask(exam, subject)
    rows = []
    for cell in cells(own):
        inside = [r for r in records if (r["setting"], r["k"]) == (cell.setting, cell.k)]
        rows.append(summary(cell, inside))
    return {
        "pool": len(pool.passages),
        "ranking": own.ranking,
        "demonstrations": own.demonstrations,
        "contexts_read_by": "decoder" if in_decoder is None else "encoder",
        "decoder_passages": in_decoder,
        "truncated_prompts": 0,
        "cells": rows,
    }, records
