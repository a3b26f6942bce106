"""Real text to hide facts in: sentences of held-out documents, or of essays.

Which document and where in it is drawn for each sample. Essays are those of RULER's material
(`ruler.data`); they cost one tokenisation (three seconds for 800,000 tokens), a store nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longctx.errors import UserError
from longctx.eval.evaluation import Evaluation
from longctx.eval.ruler.material import ESSAYS, Material, sentences
from longctx.eval.scored_windows import Documents, choose_documents
from longctx.eval.subject import Subject, digest_of, open_store

KINDS = ("held_out", "essays")


@dataclass(frozen=True)
class One:
    """One text in memory, read like a store."""

    array: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`[1]` its tokens."""
        return np.array([len(self.array)])

    def tokens(self, i: int, start: int = 0, stop: int | None = None) -> NDArray[np.integer[Any]]:
        """Tokens `start:stop`."""
        return self.array[start:stop]


@dataclass(frozen=True)
class Haystack:
    """Text to draw from.

    Args:
        documents: tokens.
        decode: tokens to text.
        name: for errors.
    """

    documents: Documents
    decode: Callable[[list[int]], str]
    name: str

    def draw(self, length: int, draw: Random, size: int | None = None) -> list[str]:
        """Whole neighbouring sentences of one document.

        Args:
            length: tokens that the document has from there on, at least.
            draw: fixes document and place.
            size: tokens that are read. None: `length`.

        Raises:
            UserError: if no document is long enough.
        """
        chosen, _ = choose_documents(self.documents, length, None, self.name)
        document = draw.choice(chosen)
        spare = int(self.documents.lengths[document]) - length
        start = draw.randint(0, spare)
        stop = start + (length if size is None else size)
        text = self.decode(self.documents.tokens(document, start, stop).tolist())
        return sentences(text)[1:-1]  # the first and the last are cut


def _material(cfg: Evaluation) -> Material:
    return Material(Path(cfg.task("ruler").data))


def haystack(cfg: Evaluation, subject: Subject, kind: str) -> Haystack:
    """The text that a task asks for.

    Args:
        cfg: the evaluation.
        subject: its tokenizer.
        kind: `held_out | essays`.

    Raises:
        UserError: if there is no such store or file.
    """
    if kind == "held_out":
        store = open_store(cfg)
        return Haystack(store, subject.decode, str(store.path))
    material = _material(cfg)
    essays = np.array(subject.encode(material.essays), dtype=np.int64)
    return Haystack(One(essays), subject.decode, str(material.folder / ESSAYS))


def identity(cfg: Evaluation, kind: str) -> str:
    """A short hash of the text.

    Raises:
        UserError: if there is no such store or file.
    """
    if kind == "held_out":
        return digest_of(open_store(cfg))
    return _material(cfg).digest([ESSAYS])


def require_sentences(found: list[str], length: int, name: str) -> list[str]:
    """The sentences.

    Raises:
        UserError: if there are none: the text has no full stops.
    """
    if not found:
        raise UserError(f"{name}: {length} tokens of it hold no whole sentence")
    return found
