"""Babi-style questions: facts of a small story, in order, between sentences of real text.

One supporting fact (`Where is Mary?`), two (`Where is the apple?`) or three (`Where was the apple
before the kitchen?`), behind two solved examples. Stories are our own simulation of people who move
about, take things and leave them, so this is neither bAbI nor BABILong, whose numbers it does not
compare with. Right is the one word on the first line, as SQuAD normalises it; guessing a place is
right once in six. Costs one prefill and some decoding steps a prompt, a prompt at a time.
Source: after bAbI (1502.05698) tasks 1 to 3 and BABILong (2406.10149).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from longctx.config.typed import choice, positive
from longctx.errors import UserError
from longctx.eval.answers import exact, wilson
from longctx.eval.ask import Cell, Prompt, Reader, is_of
from longctx.eval.evaluation import Evaluation, distinct
from longctx.eval.figures import GREY, SIZE, legend, look, new_axes, save
from longctx.eval.haystack import KINDS, Haystack, haystack, identity
from longctx.eval.headline import Column, Value, at_lengths, bounded, cells_of, mean
from longctx.eval.results import Results, result_of
from longctx.eval.subject import Subject
from longctx.eval.tables import image, percent, table, token_range
from longctx.eval.task import Found, Sample, Task, TaskResult

PEOPLE = ("Daniel", "John", "Mary", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
MOVES = ("went to", "moved to", "travelled to", "journeyed to")
TAKES = ("picked up", "took", "grabbed", "got")
DROPS = ("dropped", "put down", "left", "discarded")
HEAD = (
    "I will give you a text with facts hidden in it, about people and things. Answer the question "
    "by those facts, with the name of a place. Two examples come first."
)
EXAMPLES, EXAMPLE_FACTS = 2, 6
MOST_HOPS, FEWEST_FACTS = 3, 6


@dataclass(frozen=True)
class Babi(Task):
    """Where somebody or something is: 1 to 3 facts of a story in real text.

    Args:
        hops: supporting facts of a question, from 1 to 3; one or more.
        facts: in each story.
        samples: questions of each kind at each length.
        haystack: `held_out` (documents of that store) `| essays` (those of `ruler.data`).
        new_tokens: most tokens of an answer.
    """

    place: ClassVar[int] = 60
    by_length: ClassVar[bool] = True

    hops: list[int] = field(default_factory=lambda: [1, 2, 3])
    facts: int = 10
    samples: int = 10
    haystack: str = "held_out"
    new_tokens: int = 8

    def __post_init__(self) -> None:
        distinct(self.hops, "babi.hops", 1)
        if max(self.hops) > MOST_HOPS:
            raise UserError(f"babi.hops={list(self.hops)} must be numbers from 1 to {MOST_HOPS}")
        for key in ("samples", "new_tokens"):
            positive(getattr(self, key), f"babi.{key}")
        if self.facts < FEWEST_FACTS:
            raise UserError(
                f"babi.facts={self.facts} must be at least {FEWEST_FACTS}: three hops need as many"
            )
        choice(self.haystack, KINDS, "babi.haystack")

    @property
    def of_a_store(self) -> bool:
        """Unless the text is essays."""
        return self.haystack == "held_out"

    def inputs(self, cfg: Evaluation) -> dict[str, Any]:
        """The text and the seed."""
        return {"text": identity(cfg, self.haystack), "seed": cfg.seed}

    def run(self, cfg: Evaluation, subject: Subject) -> TaskResult:
        """The share of right answers for each number of hops at each length."""
        hay = haystack(cfg, subject, self.haystack)

        @cache
        def cell(hops: int, length: int) -> tuple[Cell, int]:
            source = Hidden(hay, hops, self.facts, length)
            kind, reader = f"{hops} hops" if hops > 1 else "1 hop", Reader(subject)
            found = Cell(self.name, kind, source, reader, length, self.new_tokens, cfg.seed)
            return found, found.size(self.samples)

        def ask(asked: tuple[int, int, int]) -> Sample:
            hops, length, index = asked
            found, size = cell(hops, length)
            return found.ask(size, index, right) | {"hops": hops}

        pairs = [(hops, length) for length in sorted(cfg.lengths) for hops in sorted(self.hops)]
        for pair in pairs:  # what cannot be asked is said before anything is
            cell(*pair)
        asked = [(*pair, index) for pair in pairs for index in range(self.samples)]
        records: list[Sample] = subject.journal.each(self.name, asked, ask)
        rows = []
        for hops, length in pairs:
            inside = [r for r in records if is_of(r, cell(hops, length)[0].kind, length)]
            rows.append({"hops": hops, "length": length, **_row(inside)})
        about = {"facts": self.facts, "haystack": self.haystack, "guessing": 1 / len(PLACES)}
        return about | {"truncated_prompts": 0, "cells": rows}, records

    @classmethod
    def section(cls, found: Found, out: Path) -> Iterator[str]:
        """Right answers by hops and length."""
        own = found[0][1]
        lengths = sorted({int(row["length"]) for _, result in found for row in result["cells"]})
        yield from ("## Babi-style questions", "")
        yield (
            f"Stories of {own['facts']} facts between sentences of real text "
            f"({own['haystack'].replace('_', '-')}), {own['cells'][0]['samples']} questions a "
            "cell; columns: tokens of the prompts; right is the one word on the first line; per "
            f"cent with 95% Wilson intervals; guessing a place: {100 * own['guessing']:.1f}; "
            "prompts truncated: 0. Ours: not bAbI's stories, and no number of BABILong's."
        )
        yield ""
        rows = []
        for model, result in found:
            for hops in sorted({c["hops"] for c in result["cells"]}):
                inside = {c["length"]: c for c in result["cells"] if c["hops"] == hops}
                scores = {n: percent(c["score"], c["interval"]) for n, c in inside.items()}
                cells = [scores.get(n, "") for n in lengths]
                tokens = token_range(list(inside.values()))
                rows.append([model["label"], str(hops), *cells, tokens])
        head = ["model", "supporting facts", *(f"{n:,}" for n in lengths), "prompt tokens"]
        yield from table(head, rows)
        figure = babi_figure([model for model, _ in found], out / "babi.png")
        yield from image("Babi-style questions", figure)

    @classmethod
    def columns(cls, models: Sequence[Results]) -> Iterator[Column]:
        """The mean over numbers of hops."""
        rows = []
        for m in models:
            values: dict[int, list[Value]] = {}
            for cell in cells_of(m, cls.name):
                values.setdefault(cell["length"], []).append(bounded(cell, "score"))
            rows.append({length: mean(found) for length, found in values.items()})
        yield from at_lengths(models, rows, "babi-style at {at}, %", percent)


def _row(records: Sequence[Sample]) -> dict[str, Any]:
    n, good = len(records), sum(int(r["score"]) for r in records)
    tokens = [r["tokens"] for r in records]
    return {
        "samples": n,
        "score": good / n,
        "interval": list(wilson(good, n)),
        "tokens": [min(tokens), max(tokens)],
    }


@dataclass
class World:
    """What has happened so far.

    Args:
        facts: sentences, in order.
        where: each person's place, and the number of the fact that says so.
        holder: who has a thing.
        been: places of each thing in order, with the number of the fact behind each.
        taken: the number of the fact that says who took a thing.
    """

    facts: list[str] = field(default_factory=list)
    where: dict[str, tuple[str, int]] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    been: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)

    def move(self, person: str, draw: Random) -> None:
        """The person goes elsewhere, with all that they hold."""
        here = self.where.get(person, ("", 0))[0]
        place = draw.choice([p for p in PLACES if p != here])
        self.where[person] = (place, len(self.facts))
        for thing in [t for t, who in self.holder.items() if who == person]:
            self.been[thing].append(self.where[person])
        self.facts.append(f"{person} {draw.choice(MOVES)} the {place}.")

    def take(self, person: str, thing: str, draw: Random) -> None:
        """The person takes a thing where they are."""
        self.holder[thing], self.taken[thing] = person, len(self.facts)
        if thing not in self.been:
            self.been[thing] = [self.where[person]]
        self.facts.append(f"{person} {draw.choice(TAKES)} the {thing} there.")

    def drop(self, thing: str, draw: Random) -> None:
        """Who has it leaves it."""
        person = self.holder.pop(thing)
        self.facts.append(f"{person} {draw.choice(DROPS)} the {thing}.")

    def step(self, hops: int, draw: Random) -> None:
        """One more fact; with one hop people only move."""
        person = draw.choice(PEOPLE)
        place = self.where.get(person, (None, 0))[0]
        near = [
            thing
            for thing in THINGS
            if thing not in self.holder
            and place is not None
            and (thing not in self.been or self.been[thing][-1][0] == place)
        ]
        held = [thing for thing, who in self.holder.items() if who == person]
        luck = draw.random()
        if hops > 1 and near and luck < 0.4:
            self.take(person, draw.choice(near), draw)
        elif hops > 1 and held and luck > 0.9:
            self.drop(draw.choice(held), draw)
        else:
            self.move(person, draw)


@dataclass(frozen=True)
class Story:
    """Facts, a question, its one answer, and which of the facts it takes."""

    facts: tuple[str, ...]
    question: str
    answer: str
    supporting: tuple[int, ...]


def _questions(world: World, hops: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """All questions with this many supporting facts: (question, answer, their numbers)."""
    if hops == 1:
        return [(f"Where is {p}?", place, (told,)) for p, (place, told) in world.where.items()]
    found: list[tuple[str, str, tuple[int, ...]]] = []
    for thing, places in world.been.items():
        last, told = places[-1]
        if hops == 2:
            found.append((f"Where is the {thing}?", last, (world.taken[thing], told)))
        elif len(places) > 1 and [p for p, _ in places].count(last) == 1:
            before, earlier = places[-2]
            facts = (world.taken[thing], earlier, told)
            found.append((f"Where was the {thing} before the {last}?", before, facts))
    return found


def tell(hops: int, facts: int, draw: Random) -> Story:
    """A story and a question of it.

    Args:
        hops: supporting facts, 1 to 3.
        facts: in all, at least 6.
        draw: fixes it.
    """
    while True:
        world = World()
        for _ in range(facts):
            world.step(hops, draw)
        if found := _questions(world, hops):
            question, answer, needed = draw.choice(found)
            return Story(tuple(world.facts), question, answer, tuple(sorted(set(needed))))


@dataclass(frozen=True)
class Hidden:
    """Stories of one kind in real text; a unit is a token of that text.

    Args:
        hay: the text.
        hops: supporting facts.
        facts: in each story.
        length: tokens that the text is drawn for.
    """

    hay: Haystack
    hops: int
    facts: int
    length: int

    @property
    def least(self) -> int:
        """The story alone."""
        return 0

    @property
    def most(self) -> int:
        """As much text as was drawn."""
        return self.length

    def write(self, size: int, index: int, draw: Random) -> Prompt:
        """A prompt with `size` tokens of text, of which the cut sentences go."""
        shown = [tell(self.hops, EXAMPLE_FACTS, draw) for _ in range(EXAMPLES)]
        story = tell(self.hops, self.facts, draw)
        spread = sorted(draw.random() for _ in story.facts)
        text = self.hay.draw(self.length, draw, size) if size else []
        places = [round(share * len(text)) for share in spread]
        lines, last = list[str](), 0
        for place, fact in zip(places, story.facts, strict=True):
            lines += [*text[last:place], fact]
            last = place
        body = " ".join([*lines, *text[last:]])
        examples = [
            f"{' '.join(s.facts)}\nQuestion: {s.question}\nAnswer: {s.answer}" for s in shown
        ]
        parts = [HEAD, *examples, f"{body}\nQuestion: {story.question}"]
        needed = tuple(story.facts[i] for i in story.supporting)
        about = {"depths": [places[i] / max(1, len(text)) for i in story.supporting]}
        return Prompt("\n\n".join(parts), "\nAnswer:", (story.answer,), needed, about)


def right(prediction: str, answers: Sequence[str]) -> float:
    """1 if the first line is an answer, as SQuAD normalises both."""
    return float(exact(prediction.split("\n", maxsplit=1)[0], answers))


def babi_figure(models: Sequence[Results], path: Path) -> str:
    """Right answers against length: a colour per model, a dash per number of hops.

    Args:
        models: contents of `results.json` that hold the task.
        path: PNG to write.

    Returns:
        The file's name.
    """
    figure, axes = new_axes(*SIZE)
    ticks: set[int] = set()
    for i, model in enumerate(models):
        cells = (result_of(model, "babi") or {})["cells"]
        for hops, dashes in {1: "-", 2: "--", 3: ":"}.items():
            line = sorted((c for c in cells if c["hops"] == hops), key=lambda c: int(c["length"]))
            if not line:
                continue
            score = [100 * c["score"] for c in line]
            low = [s - 100 * c["interval"][0] for s, c in zip(score, line, strict=True)]
            high = [100 * c["interval"][1] - s for s, c in zip(score, line, strict=True)]
            axes.errorbar(
                [c["length"] for c in line],
                score,
                yerr=[low, high],
                label=f"{model['label']}, {hops} supporting fact{'s' if hops > 1 else ''}",
                **look(model, i),
                linestyle=dashes,
                markersize=4,
                linewidth=1.4,
                capsize=2,
            )
            ticks |= {c["length"] for c in line}
    guess = 100 * (result_of(models[0], "babi") or {})["guessing"]
    axes.axhline(guess, color=GREY, linewidth=0.8, label="guessing")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [f"{n:,}" for n in sorted(ticks)])
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.set_ylim(-4, 104)
    axes.set_xlabel("prompt length, tokens")
    axes.set_ylabel("right, %")
    axes.set_title("Babi-style questions, with 95% intervals", fontsize=11)
    legend(figure)
    return save(figure, path)
