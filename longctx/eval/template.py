"""How often a model still answers in its template: held-out instructions, alone and behind text.

Behind contexts, which are held-out text, the passage that an instruction needs stands in one of
them, not in the decoder. A model with an encoder reads contexts there, another in front. Replies
are greedy; one follows the template if it is `Answer: ...`, `Done.` and the end of the document, to
the letter, and is right if also its answer is. Nothing is truncated. A prefill and some decoding
steps a prompt, a prompt at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from longctx.data.instructions import Instruction, instructions, reply
from longctx.data.store import Store
from longctx.errors import UserError
from longctx.eval.answers import wilson
from longctx.eval.config import EvalConfig
from longctx.eval.context import context_window, greedy, has_encoder
from longctx.eval.figures import Results, result_of
from longctx.eval.score import evaluating
from longctx.eval.subject import Sample, Subject, TaskResult, open_store
from longctx.eval.tables import table


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


def prompts(cfg: EvalConfig, subject: Subject, store: Store) -> Iterator[Prompt]:
    """All that is asked: the same instructions for every number of contexts.

    Raises:
        UserError: if a passage is longer than a context.
    """
    own = cfg.template
    for kind in own.kinds:
        asked = list(islice(instructions(kind, cfg.seed, held_out=True), own.questions))
        for count in sorted(own.counts):
            filler = fillers(store, own.size, count, cfg.seed) if count else iter(())
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


def inputs(cfg: EvalConfig) -> dict[str, Any]:
    """What the numbers depend on beside the settings.

    Raises:
        UserError: if there is no such store.
    """
    return {"held_out": open_store(cfg).meta["digest"][:16], "seed": cfg.seed}


def run(cfg: EvalConfig, subject: Subject) -> TaskResult:
    """The task: every kind with every number of contexts.

    Args:
        cfg: the evaluation.
        subject: the model under test, with transformers' `generate`, and its tokenizer.

    Returns:
        The result (`cells`: one row each) and one record a prompt.

    Raises:
        UserError: if a prompt or a context does not fit.
    """
    own, model = cfg.template, subject.model
    widest = context_window(model)
    if widest is not None and own.size > widest:
        raise UserError(f"template.size={own.size} exceeds the encoder's window of {widest}")
    total = len(own.kinds) * len(own.counts) * own.questions
    asked = prompts(cfg, subject, open_store(cfg))
    with evaluating(model):
        records = subject.journal.each(
            "template", asked, lambda prompt: _record(prompt, subject, own.new_tokens), total=total
        )
    cells = [_cell(records, kind, n) for n in sorted(own.counts) for kind in ("all", *own.kinds)]
    reader = "encoder" if has_encoder(model) else "decoder"
    about = {"contexts_read_by": reader, "size": own.size, "truncated_prompts": 0}
    return {**about, "cells": cells}, records


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


def section(models: Sequence[Results], _: Path) -> Iterator[str]:
    """The lines of the table, where there are results."""
    found = [(m, r) for m in models if (r := result_of(m, "template"))]
    if not found:
        return
    yield from ("## Instructions in the template", "")
    yield (
        "Replies to held-out instructions, per cent with 95% Wilson intervals: in the template to "
        "the letter, and of all the share that is also right. Columns: contexts of "
        f"{found[0][1]['size']} tokens of held-out text, which hold the passage that is asked for; "
        "prompts truncated: 0."
    )
    yield ""
    names = list(dict.fromkeys(c["count"] for _, r in found for c in r["cells"]))
    rows = []
    for model, result in found:
        for kind in dict.fromkeys(c["kind"] for c in result["cells"]):
            for key in ("follows", "right"):
                cells = {c["count"]: c for c in result["cells"] if c["kind"] == kind}
                numbers = [_percent(cells[n], key) if n in cells else "" for n in names]
                reader = result["contexts_read_by"]
                rows.append([model["label"], reader, kind, key, *numbers])
    yield from table(["model", "read by", "kind", "replies", *map(str, names)], rows)


def _percent(cell: dict[str, Any], key: str) -> str:
    low, high = (100 * x for x in cell[f"{key}_interval"])
    return f"{100 * cell[key]:.1f} [{low:.1f}, {high:.1f}]"
