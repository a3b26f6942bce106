"""What RULER's prompts are made of: essays, words, and two sets of questions with their documents.

Files of one directory, as `data_prep/ruler_data.sh` puts them there; each is read when a task needs
it. HotpotQA costs two seconds and 300 MB, the others nothing to speak of.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from longctx.errors import UserError

ESSAYS, SQUAD, HOTPOT = "essays.json", "squad.json", "hotpotqa.json"
NOUNS, ADJECTIVES, VERBS = "nounlist.txt", "adjectivelist.txt", "verblist.txt"


@dataclass(frozen=True)
class Asked:
    """A question with the documents that belong to it, indices into all documents.

    Args:
        text: the question.
        answers: accepted.
        own: documents in every prompt of it, those that answer it first.
        gold: how many of them answer it.
        near: documents to add before any other.
    """

    text: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    gold: int
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class Exam:
    """Questions, and all documents of their file in alphabetical order."""

    questions: Sequence[Asked]
    documents: Sequence[str]


@dataclass(frozen=True)
class Material:
    """The files of one directory.

    Args:
        folder: the directory.
        key: the setting that names it, for errors.
    """

    folder: Path
    key: str = "ruler.data"

    def _bytes(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise UserError(
                f"{self.key}={self.folder} has no {name} "
                "(bash data_prep/ruler_data.sh puts it there)"
            ) from error

    def _json(self, name: str) -> Any:
        try:
            return json.loads(self._bytes(name))
        except ValueError as error:
            raise UserError(f"{self.folder / name}: not readable JSON") from error

    def _lines(self, name: str) -> list[str]:
        return [line.strip() for line in self._bytes(name).decode().splitlines() if line.strip()]

    def digest(self, names: Sequence[str]) -> str:
        """A short hash of these files.

        Raises:
            UserError: if one is missing.
        """
        parts = [hashlib.sha256(self._bytes(name)).hexdigest() for name in sorted(set(names))]
        return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]

    @cached_property
    def essays(self) -> str:
        """The essays as one line of words with single spaces."""
        return " ".join(str(self._json(ESSAYS)["text"]).split())

    @cached_property
    def nouns(self) -> list[str]:
        """Nouns."""
        return self._lines(NOUNS)

    @cached_property
    def adjectives(self) -> list[str]:
        """Adjectives."""
        return self._lines(ADJECTIVES)

    @cached_property
    def words(self) -> list[str]:
        """Nouns, adjectives and verbs, each once."""
        return sorted({*self.nouns, *self.adjectives, *self._lines(VERBS)})

    @cached_property
    def squad(self) -> Exam:
        """SQuAD v2: one paragraph answers, the others of its article come first."""
        articles = [[p["context"] for p in a["paragraphs"]] for a in self._json(SQUAD)["data"]]
        documents = sorted({text for article in articles for text in article})
        place = {text: i for i, text in enumerate(documents)}
        questions = []
        for article in self._json(SQUAD)["data"]:
            inside = [place[p["context"]] for p in article["paragraphs"]]
            for paragraph in article["paragraphs"]:
                own = place[paragraph["context"]]
                near = tuple(i for i in inside if i != own)
                for asked in paragraph["qas"]:
                    if not asked["is_impossible"]:
                        answers = tuple(a["text"] for a in asked["answers"])
                        questions.append(Asked(asked["question"], answers, (own,), 1, near))
        return Exam(questions, documents)

    @cached_property
    def hotpotqa(self) -> Exam:
        """HotpotQA's distractor setting: ten documents of its own, two of which answer."""
        found = self._json(HOTPOT)
        texts = [[(title, f"{title}\n{''.join(p)}") for title, p in q["context"]] for q in found]
        documents = sorted({text for own in texts for _, text in own})
        place = {text: i for i, text in enumerate(documents)}
        questions = []
        for asked, own in zip(found, texts, strict=True):
            facts = {title for title, _ in asked["supporting_facts"]}
            order = sorted(own, key=lambda entry: entry[0] not in facts)
            gold = sum(title in facts for title, _ in own)
            places = tuple(place[text] for _, text in order)
            questions.append(Asked(asked["question"], (asked["answer"],), places, gold))
        return Exam(questions, documents)


def sentences(text: str) -> list[str]:
    """The text cut after `.`, `!` or `?` and white space.

    >>> sentences("One. Two?  Three")
    ['One.', 'Two?', 'Three']
    """
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]
