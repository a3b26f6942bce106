"""RULER: 13 tasks of retrieval, tracing, counting and questions at any length, offline.

Prompts and scores are NVIDIA's: a reply scores the share of references that are in it, lower case
(with documents: any of them), and the effective length is the largest whose average over tasks
reaches a threshold. Other than there, a prompt is filled as nearly to its length as a line, word or
document allows, and each sample has its own seed. Greedy decoding of up to 128 tokens, a prompt at
a time: one prefill and so many steps.
Source: RULER (2404.06654) and its code, package nvidia-long-context-eval 26.3.
"""

from collections.abc import Callable, Sequence
from functools import cache
from math import sqrt
from pathlib import Path
from typing import Any

from longctx.errors import UserError
from longctx.eval import ruler_data as files
from longctx.eval.answers import Z, interval
from longctx.eval.ask import Cell, Reader, Source
from longctx.eval.config import EvalConfig
from longctx.eval.config_ruler import NEEDLES, RULER_TASKS
from longctx.eval.ruler_data import Material
from longctx.eval.ruler_length import effective
from longctx.eval.ruler_qa import Documents
from longctx.eval.ruler_text import SHORT, CommonWords, FrequentWords, Niah, variables
from longctx.eval.subject import Sample, Subject, TaskResult

Count = Callable[[str], int]
# haystack, keys, values; needles, values of each, asked
NIAH = {
    "niah_single_1": ("repeat", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
}
NEW_TOKENS = dict.fromkeys(NEEDLES, 128) | {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
WORDS = (files.NOUNS, files.ADJECTIVES)
NEEDED = dict.fromkeys(NEEDLES, (files.ESSAYS, *WORDS)) | {
    "niah_single_1": WORDS,
    "niah_multikey_2": WORDS,
    "niah_multikey_3": (),
    "vt": (),
    "cwe": (*WORDS, files.VERBS),
    "fwe": (),
    "qa_1": (files.SQUAD,),
    "qa_2": (files.HOTPOT,),
}


def match_all(prediction: str, references: Sequence[str]) -> float:
    """The share of references that are in the prediction, whatever the case."""
    found = prediction.lower()
    return sum(reference.lower() in found for reference in references) / len(references)


def match_part(prediction: str, references: Sequence[str]) -> float:
    """1 if any of the references is in the prediction, whatever the case, else 0."""
    found = prediction.lower()
    return float(any(reference.lower() in found for reference in references))


SCORES = dict.fromkeys(RULER_TASKS, match_all) | {"qa_1": match_part, "qa_2": match_part}


def frequent_words(length: int) -> FrequentWords:
    """Frequent words with NVIDIA's vocabulary, a word for 50 tokens of `length`.

    Raises:
        UserError: if that is too small a vocabulary to ask for three of it.
    """
    if length // 50 < 5:
        raise UserError(f"ruler: fwe needs lengths of at least 250 tokens, not {length}")
    return FrequentWords(length // 50)


def source(task: str, length: int, material: Material, count: Count, seed: int) -> Source:
    """What writes the prompts of a task.

    Args:
        task: one of `RULER_TASKS`.
        length: most tokens, some tasks draw from fewer words below 4,096.
        material: essays, words and questions.
        count: tokens of a text.
        seed: of the order of questions.

    Raises:
        UserError: if a file is missing, or the length leaves no room for the task at all.
    """
    if task in NIAH:
        haystack, keys, values, needles, each, asked = NIAH[task]
        nouns, adjectives = (material.nouns, material.adjectives) if keys == "words" else ([], [])
        essay = material.essays.split(" ") if haystack == "essay" else []
        return Niah(haystack, keys, values, needles, each, asked, nouns, adjectives, essay)
    if task == "vt":
        return variables(count, NEW_TOKENS[task])
    if task == "cwe":
        return CommonWords(material.words, length < SHORT)
    if task == "fwe":
        return frequent_words(length)
    return Documents(material.squad if task == "qa_1" else material.hotpotqa, seed)


def weighted(averages: Sequence[dict[str, Any]], rising: bool) -> float:
    """Mean over lengths with weights 1, 2, .. from the shortest, or from the longest."""
    ordered = sorted(averages, key=lambda a: a["length"] if rising else -a["length"])
    total = sum(weight * a["score"] for weight, a in enumerate(ordered, 1))
    return float(total / sum(range(1, len(ordered) + 1)))


def average(rows: Sequence[dict[str, Any]], length: int) -> dict[str, Any]:
    """Mean over tasks at a length; 95% interval by the normal law, tasks being strata.

    Args:
        rows: with `length`, `score` and `variance` (of the score of the row, as a mean).
        length: of the rows to take.
    """
    inside = [r for r in rows if r["length"] == length]
    score = sum(r["score"] for r in inside) / len(inside)
    half = Z * sqrt(sum(r["variance"] for r in inside)) / len(inside)
    bounds = [max(0.0, score - half), min(1.0, score + half)]
    return {"length": length, "score": score, "interval": bounds, "tasks": len(inside)}


def row(task: str, length: int, records: Sequence[Sample]) -> dict[str, Any]:
    """The result of a cell."""
    scores = [float(r["score"]) for r in records]
    n, tokens = len(scores), [r["tokens"] for r in records]
    mean = sum(scores) / n
    spread = sum((s - mean) ** 2 for s in scores) / max(1, n - 1)
    low, high = interval(scores)
    return {
        "task": task,
        "length": length,
        "samples": n,
        "score": mean,
        "interval": [low, high],
        # A few samples that are all right do not make the score sure.
        "variance": max(spread / n, ((high - low) / 2 / Z) ** 2),
        "empty": sum(not r["prediction"] for r in records),
        "tokens": [min(tokens), max(tokens)],
        "new_tokens": NEW_TOKENS[task],
    }


def inputs(cfg: EvalConfig) -> dict[str, Any]:
    """What the numbers depend on beside the settings.

    Raises:
        UserError: if a file is missing.
    """
    names = [name for task in cfg.ruler.tasks for name in NEEDED[task]]
    return {"data": Material(Path(cfg.ruler.data)).digest(names), "seed": cfg.seed}


def run(cfg: EvalConfig, subject: Subject) -> TaskResult:
    """The task: every one of its tasks at every length.

    Args:
        cfg: the evaluation.
        subject: the model under test, with transformers' `generate`, and its tokenizer.

    Returns:
        The result (`cells`: one row a task and length, `averages`: one a length,
        `effective_length`: None with too few samples) and one record a prompt.

    Raises:
        UserError: if a file is missing, or a prompt does not fit its length.
    """
    own, material = cfg.ruler, Material(Path(cfg.ruler.data))
    reader = Reader(subject, own.chat, "ruler.chat")

    @cache
    def cell(task: str, length: int) -> tuple[Cell, int]:
        made = source(task, length, material, lambda text: len(subject.encode(text)), cfg.seed)
        found = Cell("ruler", task, made, reader, length, NEW_TOKENS[task], cfg.seed)
        return found, found.size(own.samples)

    def ask(asked: tuple[str, int, int]) -> Sample:
        task, length, index = asked
        found, size = cell(task, length)
        return found.ask(size, index, SCORES[task])

    lengths = sorted(cfg.lengths)
    pairs = [(task, length) for length in lengths for task in own.tasks]
    for task, length in pairs:  # what cannot be asked is said before anything is
        cell(task, length)
    asked = [(*pair, index) for pair in pairs for index in range(own.samples)]
    records: list[Sample] = subject.journal.each("ruler", asked, ask)
    rows = []
    for task, length in pairs:
        rows.append(row(task, length, [r for r in records if is_of(r, task, length)]))
    averages = [average(rows, length) for length in lengths]
    told = effective({"cells": rows, "averages": averages, "threshold": own.threshold})
    return {
        "chat": own.chat,
        "threshold": own.threshold,
        "effective_length": None if told is None else told.length,
        "effective_range": None if told is None else [told.least, told.most],
        "rising": weighted(averages, rising=True),
        "falling": weighted(averages, rising=False),
        "truncated_prompts": 0,
        "averages": averages,
        "cells": rows,
    }, records


def is_of(record: Sample, kind: str, length: int) -> bool:
    """Whether a record belongs to a cell."""
    return (record["kind"], record["length"]) == (kind, length)
