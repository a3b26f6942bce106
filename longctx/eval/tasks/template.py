"""How often a model still answers in its template: held-out instructions, alone and behind text.

Behind contexts, which are held-out text, the passage that an instruction needs is in one of them,
not in the decoder's own tokens. A model with an encoder reads contexts there, another in front.
Replies are greedy; one follows the template if it is `Answer: ...`, `Done.` and the end of the
document, to the letter, and is right if its answer is too. Nothing is truncated. Costs a prefill
and some decoding steps a prompt, a prompt at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from longctx.config.typed import choice, positive
from longctx.data.instructions import KINDS, Instruction, instructions, reply
from longctx.data.store import Store
from longctx.errors import UserError
from longctx.eval.answers import wilson
from longctx.eval.evaluation import Evaluation, distinct
from longctx.eval.headline import Column, bounded, cells_of, shared
from longctx.eval.results import Results
from longctx.eval.score import context_window, evaluating, greedy, has_encoder
from longctx.eval.subject import Subject, open_store
from longctx.eval.tables import percent, table
from longctx.eval.task import Found, Sample, Task, TaskResult


@dataclass(frozen=True)
class Template(Task):
    """Held-out instructions in the lab's chat template, alone and behind contexts.

    Args:
        kinds: `key | repeat | list`, one or more; see `longctx/data/instructions.py`.
        counts: numbers of contexts of held-out text before them; 0: none.
        size: tokens in a context.
        questions: asked of each kind with each number.
        new_tokens: most tokens of a reply.
    """

    place: ClassVar[int] = 110

    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    counts: list[int] = field(default_factory=lambda: [0, 2])
    size: int = 64
    questions: int = 50
    new_tokens: int = 32

    def __post_init__(self) -> None:
        for kind in self.kinds:
            choice(kind, tuple(KINDS), "template.kinds")
        if not self.kinds:
            raise UserError(f"template.kinds=[] must name at least one of {', '.join(KINDS)}")
        distinct(self.counts, "template.counts", 0)
        for key in ("size", "questions", "new_tokens"):
            positive(getattr(self, key), f"template.{key}")

    @property
    def of_a_store(self) -> bool:
        """Contexts are its text."""
        return True

    def run(self, cfg: Evaluation, subject: Subject) -> TaskResult:
        """Every kind with every number of contexts: one row each, and one record a prompt."""
        model = subject.model
        widest = context_window(model)
        if widest is not None and self.size > widest:
            raise UserError(f"template.size={self.size} exceeds the encoder's window of {widest}")
        total = len(self.kinds) * len(self.counts) * self.questions
        asked = prompts(self, subject, open_store(cfg), cfg.seed)
        with evaluating(model):
            records = subject.journal.each(
                self.name,
                asked,
                lambda prompt: _record(prompt, subject, self.new_tokens),
                total=total,
            )
        kinds, counts = ("all", *self.kinds), sorted(self.counts)
        cells = [_cell(records, kind, n) for n in counts for kind in kinds]
        reader = "encoder" if has_encoder(model) else "decoder"
        about = {"contexts_read_by": reader, "size": self.size, "truncated_prompts": 0}
        return {**about, "cells": cells}, records

    @classmethod
    def section(cls, found: Found, out: Path) -> Iterator[str]:
        """Two rows a model and kind, a column a number of contexts."""
        yield from ("## Instructions in the template", "")
        yield (
            "Replies to held-out instructions, per cent with 95% Wilson intervals: in the template "
            "to the letter, and of all the share that is also right. Columns: contexts of "
            f"{found[0][1]['size']} tokens of held-out text, which hold the passage that is asked "
            "for; prompts truncated: 0."
        )
        yield ""
        counts = list(dict.fromkeys(c["count"] for _, r in found for c in r["cells"]))
        rows = []
        for model, result in found:
            for kind in dict.fromkeys(c["kind"] for c in result["cells"]):
                inside = {c["count"]: c for c in result["cells"] if c["kind"] == kind}
                for key in ("follows", "right"):
                    shares = {n: percent(c[key], c[f"{key}_interval"]) for n, c in inside.items()}
                    numbers = [shares.get(n, "") for n in counts]
                    rows.append([model["label"], result["contexts_read_by"], kind, key, *numbers])
        yield from table(["model", "read by", "kind", "replies", *map(str, counts)], rows)

    @classmethod
    def columns(cls, models: Sequence[Results]) -> Iterator[Column]:
        """The share in the template behind the most contexts."""
        rows = []
        for m in models:
            own = [c for c in cells_of(m, cls.name) if c["kind"] == "all"]
            rows.append({c["count"]: bounded(c, "follows") for c in own})
        for most in shared(rows)[-1:]:
            title = f"in the template behind {most} contexts, %"
            yield Column(title, [r.get(most) for r in rows], percent)


@dataclass(frozen=True)
class Prompt:
    """One instruction, placed.

    Args:
        instruction: what is asked.
        count: contexts before it.
        tokens: what the decoder reads behind a BOS, without contexts.
        contexts: tokens of each context.
    """

    instruction: Instruction
    count: int
    tokens: list[int]
    contexts: list[list[int]]


def fillers(store: Store, size: int, count: int, seed: int) -> Iterator[list[list[int]]]:
    """Endless groups of `count` neighbouring pieces of `size` tokens of one held-out document.

    Raises:
        UserError: if no document is long enough.
    """
    room = np.flatnonzero(store.lengths >= size * count + 2)
    if not len(room):
        raise UserError(
            f"{store.path} has no document of {size * count + 2:,} tokens for template.counts"
        )
    draw = np.random.Generator(np.random.Philox([seed, count]))
    while True:
        document = int(draw.choice(room))
        first = int(draw.integers(1, store.lengths[document] - size * count))
        text = store.tokens(document, first, first + size * count).tolist()
        yield [text[i * size : (i + 1) * size] for i in range(count)]


def prompts(own: Template, subject: Subject, store: Store, seed: int) -> Iterator[Prompt]:
    """All that is asked: the same instructions for every number of contexts.

    Raises:
        UserError: if a passage is longer than a context.
    """
    for kind in own.kinds:
        asked = list(islice(instructions(kind, seed, held_out=True), own.questions))
        for count in sorted(own.counts):
            filler = fillers(store, own.size, count, seed) if count else iter(())
            for number, instruction in enumerate(asked):
                if not count:
                    yield Prompt(instruction, 0, subject.encode(instruction.prompt), [])
                    continue
                contexts, passage = next(filler), subject.encode(instruction.passage)
                if len(passage) > own.size:
                    raise UserError(
                        f"template.size={own.size}: a passage has {len(passage)} tokens"
                    )
                if passage:
                    place = number % count
                    contexts[place] = contexts[place][: own.size - len(passage)] + passage
                bare = instruction.prompt.removeprefix(instruction.passage).lstrip("\n")
                yield Prompt(instruction, count, subject.encode(bare), contexts)


def _ask(prompt: Prompt, subject: Subject, new_tokens: int) -> list[int]:
    model, bos = subject.model, subject.tokenizer.bos_token_id
    in_front = [] if has_encoder(model) else prompt.contexts
    beside = prompt.contexts if has_encoder(model) else []
    tokens = [] if bos is None else [bos]
    tokens += [token for context in in_front for token in context] + prompt.tokens
    window = int(model.config.max_position_embeddings)
    if len(tokens) + new_tokens > window:
        raise UserError(
            f"template: {prompt.instruction.kind} behind {prompt.count} contexts: {len(tokens)} "
            f"tokens and {new_tokens} of the reply exceed the window of {window}: fewer "
            "template.counts, or a smaller template.size"
        )
    return greedy(model, tokens, new_tokens, beside)


def _record(prompt: Prompt, subject: Subject, new_tokens: int) -> Sample:
    asked, new = prompt.instruction, _ask(prompt, subject, new_tokens)
    text, ended = subject.decode(new), new[-1:] == [subject.tokenizer.eos_token_id]
    answer = reply(text) if ended else None
    return {
        "task": "template",
        "kind": asked.kind,
        "count": prompt.count,
        "question": asked.question,
        "answer": asked.answer,
        "reply": text,
        "ended": ended,
        "follows": answer is not None,
        "right": answer == asked.answer,
        "tokens": len(prompt.tokens),
    }


def _cell(records: Sequence[Sample], kind: str, count: int) -> dict[str, Any]:
    inside = [r for r in records if r["count"] == count and kind in ("all", r["kind"])]
    row: dict[str, Any] = {"kind": kind, "count": count, "prompts": len(inside)}
    for key in ("follows", "right"):
        found = sum(r[key] for r in inside)
        row |= {key: found / len(inside), f"{key}_interval": list(wilson(found, len(inside)))}
    return row
