"""Babi-style questions: facts of a small story, in order, between sentences of real text.

One supporting fact (`Where is Mary?`), two (`Where is the apple?`) or three (`Where was the apple
before the kitchen?`), behind two solved examples. Stories are our own simulation of people who move
about, take things and leave them, so this is neither bAbI nor BABILong, whose numbers it does not
compare with. Right is the one word on the first line, as SQuAD normalises it; guessing a place is
right once in six. Costs one prefill and some decoding steps a prompt, a prompt at a time.
Source: after bAbI (1502.05698) tasks 1 to 3 and BABILong (2406.10149).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any

from longctx.eval.answers import exact, wilson
from longctx.eval.ask import Cell, Prompt, Reader
from longctx.eval.config import EvalConfig
from longctx.eval.haystack import Haystack, haystack, identity
from longctx.eval.ruler import is_of
from longctx.eval.subject import Sample, Subject, TaskResult

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


@dataclass
class World:
    """What has happened so far.

    Args:
        facts: told, in order.
        where: each person's place, and the fact that told it.
        holder: who has a thing.
        been: of each thing its places in order, and the facts that told each.
        taken: the fact that told who took it.
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
    """All questions of so many hops: (question, answer, supporting facts)."""
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


def inputs(cfg: EvalConfig) -> dict[str, Any]:
    """What the numbers depend on beside the settings.

    Raises:
        UserError: if there is no such text.
    """
    return {"text": identity(cfg, cfg.babi.haystack), "seed": cfg.seed}


def run(cfg: EvalConfig, subject: Subject) -> TaskResult:
    """The task: every number of hops at every length.

    Args:
        cfg: the evaluation.
        subject: the model under test, with transformers' `generate`, and its tokenizer.

    Returns:
        The result (`cells`: one row each) and one record a prompt.

    Raises:
        UserError: if there is no such text, or a prompt does not fit.
    """
    own, hay = cfg.babi, haystack(cfg, subject, cfg.babi.haystack)

    @cache
    def cell(hops: int, length: int) -> tuple[Cell, int]:
        source = Hidden(hay, hops, own.facts, length)
        kind, reader = f"{hops} hops" if hops > 1 else "1 hop", Reader(subject)
        found = Cell("babi", kind, source, reader, length, own.new_tokens, cfg.seed)
        return found, found.size(own.samples)

    def ask(asked: tuple[int, int, int]) -> Sample:
        hops, length, index = asked
        found, size = cell(hops, length)
        return found.ask(size, index, right) | {"hops": hops}

    pairs = [(hops, length) for length in sorted(cfg.lengths) for hops in sorted(own.hops)]
    for pair in pairs:
        cell(*pair)
    asked = [(*pair, index) for pair in pairs for index in range(own.samples)]
    records: list[Sample] = subject.journal.each("babi", asked, ask)
    rows = []
    for hops, length in pairs:
        inside = [r for r in records if is_of(r, cell(hops, length)[0].kind, length)]
        n, good = len(inside), sum(int(r["score"]) for r in inside)
        tokens = [r["tokens"] for r in inside]
        rows.append(
            {
                "hops": hops,
                "length": length,
                "samples": n,
                "score": good / n,
                "interval": list(wilson(good, n)),
                "tokens": [min(tokens), max(tokens)],
            }
        )
    about = {"facts": own.facts, "haystack": own.haystack, "guessing": 1 / len(PLACES)}
    return about | {"truncated_prompts": 0, "cells": rows}, records
