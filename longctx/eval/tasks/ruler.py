"""RULER: 13 tasks of retrieval, tracing, counting and questions at any length, offline.

Prompts and scores are NVIDIA's (`longctx/eval/ruler/`): a reply scores the share of references that
are in it, ignoring case (with documents: any of them). Unlike NVIDIA's, a prompt is filled as close
to its length as a line, word or document allows, and each sample has its own seed. Costs a prefill
and up to 128 steps of greedy decoding a prompt, a prompt at a time.
Source: RULER (2404.06654) and its code, package nvidia-long-context-eval 26.3.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from longctx.config.typed import choice, positive
from longctx.errors import UserError
from longctx.eval.ask import Cell, Reader, Source, is_of
from longctx.eval.evaluation import Evaluation
from longctx.eval.figures import (
    WINDOWS,
    colour_scale,
    mark_windows,
    panel_title,
    panels,
    save,
    tiles,
)
from longctx.eval.headline import Column, at_lengths, bounded, cells_of, certain, count
from longctx.eval.results import Results, result_of
from longctx.eval.ruler import material as files
from longctx.eval.ruler.material import Material
from longctx.eval.ruler.prompts import (
    SHORT,
    CommonWords,
    Documents,
    FrequentWords,
    Niah,
    variables,
)
from longctx.eval.ruler.scores import (
    ENOUGH,
    average,
    effective,
    match_all,
    match_part,
    row,
    weighted,
)
from longctx.eval.subject import Subject
from longctx.eval.tables import image, percent, table, token_range
from longctx.eval.task import Found, Sample, Task, TaskResult

Count = Callable[[str], int]
NO_LENGTH = "too few samples for an effective length"
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
NEW_TOKENS = dict.fromkeys(NIAH, 128) | {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
WORDS = (files.NOUNS, files.ADJECTIVES)
NEEDED = dict.fromkeys(NIAH, (files.ESSAYS, *WORDS)) | {
    "niah_single_1": WORDS,
    "niah_multikey_2": WORDS,
    "niah_multikey_3": (),
    "vt": (),
    "cwe": (*WORDS, files.VERBS),
    "fwe": (),
    "qa_1": (files.SQUAD,),
    "qa_2": (files.HOTPOT,),
}
RULER_TASKS = (*NIAH, "vt", "cwe", "fwe", "qa_1", "qa_2")
SCORES = dict.fromkeys(RULER_TASKS, match_all) | {"qa_1": match_part, "qa_2": match_part}


@dataclass(frozen=True)
class Ruler(Task):
    """RULER's 13 tasks of retrieval, tracing, counting and questions.

    Args:
        tasks: `niah_single_1 .. 3 | niah_multikey_1 .. 3 | niah_multivalue | niah_multiquery |
            vt | cwe | fwe | qa_1 | qa_2`, one or more.
        data: directory with the essays, questions and words (`bash data_prep/ruler_data.sh`).
        samples: prompts of each task at each length; NVIDIA takes 500.
        threshold: average, per cent, that an effective length reaches; NVIDIA's is 85.6, that of
            Llama-2-7B-chat at 4,096 tokens.
        chat: the text in the tokenizer's chat template, for instructed models.
    """

    place: ClassVar[int] = 40
    by_length: ClassVar[bool] = True

    tasks: list[str] = field(default_factory=lambda: list(RULER_TASKS))
    data: str = "data/ruler"
    samples: int = 5
    threshold: float = 85.6
    chat: bool = False

    def __post_init__(self) -> None:
        for task in self.tasks:
            choice(task, RULER_TASKS, "ruler.tasks")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"ruler.tasks={list(self.tasks)} must be different tasks, at least one")
        positive(self.samples, "ruler.samples")
        if not 0 < self.threshold <= 100:
            raise UserError(f"ruler.threshold={self.threshold} must be per cent, above 0 to 100")

    def inputs(self, cfg: Evaluation) -> dict[str, Any]:
        """The files that the tasks read, and the seed."""
        names = [name for task in self.tasks for name in NEEDED[task]]
        return {"data": Material(Path(self.data)).digest(names), "seed": cfg.seed}

    def run(self, cfg: Evaluation, subject: Subject) -> TaskResult:
        """Every one of its tasks at every length.

        Returns:
            The result (`cells`: one row a task and length, `averages`: one a length,
            `effective_length`: None with too few samples) and one record a prompt.
        """
        material, reader = Material(Path(self.data)), Reader(subject, self.chat, "ruler.chat")

        @cache
        def cell(task: str, length: int) -> tuple[Cell, int]:
            made = source(task, length, material, lambda text: len(subject.encode(text)), cfg.seed)
            found = Cell(self.name, task, made, reader, length, NEW_TOKENS[task], cfg.seed)
            return found, found.size(self.samples)

        def ask(asked: tuple[str, int, int]) -> Sample:
            task, length, index = asked
            found, size = cell(task, length)
            return found.ask(size, index, SCORES[task])

        lengths = sorted(cfg.lengths)
        pairs = [(task, length) for length in lengths for task in self.tasks]
        for task, length in pairs:  # what cannot be asked is said before anything is
            cell(task, length)
        asked = [(*pair, index) for pair in pairs for index in range(self.samples)]
        records: list[Sample] = subject.journal.each(self.name, asked, ask)
        rows = []
        for task, length in pairs:
            inside = [r for r in records if is_of(r, task, length)]
            rows.append(row(task, length, inside, NEW_TOKENS[task]))
        averages = [average(rows, length) for length in lengths]
        reached = effective({"cells": rows, "averages": averages, "threshold": self.threshold})
        return {
            "chat": self.chat,
            "threshold": self.threshold,
            "effective_length": None if reached is None else reached.length,
            "effective_range": None if reached is None else [reached.least, reached.most],
            "rising": weighted(averages, rising=True),
            "falling": weighted(averages, rising=False),
            "truncated_prompts": 0,
            "averages": averages,
            "cells": rows,
        }, records

    @classmethod
    def section(cls, found: Found, out: Path) -> Iterator[str]:
        """Averages and effective lengths, scores by task, and a map of task x length."""
        lengths = sorted({int(a["length"]) for _, result in found for a in result["averages"]})
        own = found[0][1]
        yield from ("## RULER", "")
        yield (
            f"Average over tasks, per cent with 95% intervals; NVIDIA's prompts and scores, "
            f"greedy, {own['cells'][0]['samples']} samples of a task at a length; columns: tokens, "
            "the room for the answer included; prompts truncated: 0. Effective length: the largest "
            f"of these lengths whose average reaches {own['threshold']:g}, in brackets by the ends "
            f"of the intervals; none is given with fewer than {ENOUGH} samples of a task. "
            "Weighted: means over lengths with rising or falling weights."
        )
        yield ""
        rows = [_averages(model, result, lengths) for model, result in found]
        head = ["model", "tasks", *(f"{n:,}" for n in lengths), "effective length"]
        yield from table([*head, "weighted, rising", "weighted, falling"], rows)
        rows = [line for model, result in found for line in _by_task(model, result, lengths)]
        head = ["model", "task", *(f"{n:,}" for n in lengths), "tokens at the longest"]
        yield from table(head, rows)
        figure = ruler_figure([model for model, _ in found], out / "ruler.png")
        yield from image(f"RULER by task and length; {WINDOWS}", figure)

    @classmethod
    def columns(cls, models: Sequence[Results]) -> Iterator[Column]:
        """The average over tasks, and the effective length, which has no interval here."""
        rows = [
            {a["length"]: bounded(a, "score") for a in cells_of(m, cls.name, "averages")}
            for m in models
        ]
        yield from at_lengths(models, rows, "RULER at {at}, %", percent)
        reached = [effective(r) if (r := result_of(m, cls.name)) else None for m in models]
        values = certain([None if e is None else e.length for e in reached])
        yield Column("RULER effective length, tokens", values, count, ranked=False)


def _averages(model: Results, result: dict[str, Any], lengths: Sequence[int]) -> list[str]:
    averages = {a["length"]: percent(a["score"], a["interval"]) for a in result["averages"]}
    most = max(a["tasks"] for a in result["averages"])
    name = model["label"] + (" (chat template)" if result["chat"] else "")
    length = effective(result)
    reached = "too few samples" if length is None else str(length)
    weights = [percent(result[key]) for key in ("rising", "falling")]
    cells = [averages.get(n, "") for n in lengths]
    return [name, f"{most} of {len(RULER_TASKS)}", *cells, reached, *weights]


def _by_task(model: Results, result: dict[str, Any], lengths: Sequence[int]) -> Iterator[list[str]]:
    for task in dict.fromkeys(c["task"] for c in result["cells"]):
        inside = {c["length"]: c for c in result["cells"] if c["task"] == task}
        scores = {n: percent(c["score"], c["interval"]) for n, c in inside.items()}
        longest = inside[max(inside)]
        tokens = f"{token_range([longest])} + {longest['new_tokens']}"
        yield [model["label"], task, *(scores.get(n, "") for n in lengths), tokens]


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


def ruler_figure(models: Sequence[Results], path: Path) -> str:
    """A heat map per model: task x length, the average at the bottom, per cent.

    Args:
        models: contents of `results.json` that hold the task.
        path: PNG to write.

    Returns:
        The file's name.
    """
    found = [result_of(model, "ruler") or {} for model in models]
    figure, grid = panels(models, max(len(r["averages"]) for r in found), 4.6)
    for axes, model, result in zip(grid, models, found, strict=False):
        values = {(c["task"], c["length"]): c["score"] for c in result["cells"]}
        values |= {("average", a["length"]): a["score"] for a in result["averages"]}
        lengths = sorted(a["length"] for a in result["averages"])
        rows = [*dict.fromkeys(c["task"] for c in result["cells"]), "average"]
        image = tiles(axes, values, rows, lengths)
        axes.axhline(len(rows) - 1.5, color="white", linewidth=3)
        mark_windows(axes, model, lengths)
        length = effective(result)
        panel_title(axes, model, NO_LENGTH if length is None else f"effective length {length}")
    colour_scale(figure, grid, image, "RULER score, %")
    return save(figure, path)
