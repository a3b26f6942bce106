"""Decontamination: finds documents that must not be trained on because they are evaluated on.

There are two tests. By metadata: the title or Project Gutenberg number is in a list of books. By
content: the document shares word 13-grams with an evaluation text. A word is a run of letters,
digits and non-ASCII bytes, with ASCII letters in lower case, so line breaks, case and punctuation
have no effect; typographic quotes, dashes and dots count as punctuation. In languages written
without spaces, a "word" is a whole stretch of text, and only near-verbatim copies are found.

13-grams are compared by 64-bit hashes. With n evaluation 13-grams, an unrelated one matches by
accident with probability n / 2^64: 4e-13 for the 7 million of PG19's test books. To drop a
document wrongly, hundreds of such accidents would have to fall into one window.

Cost: a few numpy passes over the bytes, about 200 MB per second and core (a tokenizer: about 5 MB);
20 bytes of memory per evaluation 13-gram, and at most 100 MB for the current text.
"""

import csv
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longctx.errors import UserError

NGRAM = 13  # words
SLAB_BYTES = 1 << 18  # fits into a processor's cache
EBOOK = re.compile(r"(?:ebooks|etext|files|epub)/(\d+)")
TITLE_KEYS = ("short_book_title", "title")

Hashes = NDArray[np.uint64]

_LETTERS = bytes(range(0x30, 0x3A)) + bytes(range(0x61, 0x7B)) + bytes(range(0x80, 0x100))
TABLE = bytes(c if c in _LETTERS else c + 32 if 0x41 <= c <= 0x5A else 0 for c in range(256))
WORD_BYTES = 64  # a longer word is hashed by its first 64 bytes and its length
# Odd multipliers with well mixed bits, those of splitmix64.
WORD = tuple(np.uint64(pow(0x9E3779B97F4A7C15, k, 1 << 64)) for k in range(1, WORD_BYTES // 8 + 1))
LENGTH = np.uint64(0xBF58476D1CE4E5B9)
BASE = 0x94D049BB133111EB
P1, P2, P4, P8, P12 = (np.uint64(pow(BASE, k, 1 << 64)) for k in (1, 2, 4, 8, 12))
KEEP = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # the first n of 8 bytes


def _word_hashes(data: bytes) -> Hashes:
    """`[words]` hashes of the words of UTF-8 `data`."""
    text = np.frombuffer(bytearray(1) + data.translate(TABLE) + bytes(WORD_BYTES + 1), np.uint8)
    if b"\xe2\x80" in data:  # U+2010 to U+2027 are E2 80 90 to E2 80 A7
        at = np.flatnonzero(text == 0xE2)
        at = at[(text[at + 1] == 0x80) & (text[at + 2] >= 0x90) & (text[at + 2] <= 0xA7)]
        for byte in range(3):
            text[at + byte] = 0
    inside = text != 0
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    starts = edges[::2]
    lengths = edges[1::2] - starts
    eight = np.ndarray((len(text) - 7,), "<u8", text.data, 0, (1,))  # 8 bytes from each byte on
    hashes = lengths.view(np.uint64) * LENGTH
    hashes += (eight[starts] & KEEP[np.minimum(lengths, 8)]) * WORD[0]
    for part in range(1, WORD_BYTES // 8):
        long = np.flatnonzero(lengths > 8 * part)
        if not len(long):
            break
        rest = KEEP[np.minimum(lengths[long] - 8 * part, 8)]
        hashes[long] += (eight[starts[long] + 8 * part] & rest) * WORD[part]
    return hashes ^ (hashes >> np.uint64(32))


def _grams(text: str) -> Iterator[Hashes]:
    """Hashes of the 13-grams of `text`, in order, about `SLAB_BYTES` of text at a time."""
    data = text.encode("utf-8", "surrogatepass")
    last = np.zeros(0, np.uint64)
    for slab in _slabs(data):
        words = np.concatenate([last, _word_hashes(slab)])
        last = words[-(NGRAM - 1) :]
        if len(words) >= NGRAM:
            two = words[:-1] + words[1:] * P1
            four = two[:-2] + two[2:] * P2
            eight = four[:-4] + four[4:] * P4
            twelve = eight[:-4] + four[8:] * P8
            yield (twelve[:-1] + words[12:] * P12).astype(np.uint64, copy=False)


def _slabs(data: bytes) -> Iterator[bytes]:
    start = 0
    while len(data) - start > SLAB_BYTES:
        cut = re.compile(rb"\s").search(data, start + SLAB_BYTES)
        if cut is None:
            break
        yield data[start : cut.start()]
        start = cut.start()
    yield data[start:]


@dataclass(frozen=True)
class Evaluation:
    """Texts and titles that must not be trained on; made by `load`.

    Attributes:
        identity: hash of everything that decides: the files' contents and the settings.
        window: length of the window in which shared 13-grams are counted, words.
        fraction: share of a window's 13-grams that makes a hit.
        titles: normalised titles.
        ebooks: Project Gutenberg numbers.
        grams: `[n]` sorted hashes.
        owners: `[n]` index in `names` of the first text that contains each.
        names: names of the evaluation texts.
        table: bit table over the upper bits of the hashes, a fast first test.
    """

    identity: str
    window: int
    fraction: float
    titles: frozenset[str] = frozenset()
    ebooks: frozenset[str] = frozenset()
    grams: Hashes = field(default_factory=lambda: np.zeros(0, np.uint64), repr=False)
    owners: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32), repr=False)
    names: tuple[str, ...] = field(default=(), repr=False)
    table: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(1, np.uint8), repr=False)

    @classmethod
    def load(
        cls,
        files: Sequence[Path],
        titles: Sequence[Path],
        window: int = 1000,
        fraction: float = 0.8,
    ) -> "Evaluation":
        """Reads evaluation texts and title lists.

        Args:
            files: `.jsonl` (one evaluation text per line, field "text") or `.txt` (one text per
                file).
            titles: files with one title or Project Gutenberg number per line, or `.csv` files with
                rows of number, title, year, address, like PG19's `metadata.csv`.
            window: words; a shorter document is one window.
            fraction: share of a window's 13-grams that makes a hit.

        Raises:
            UserError: if a file is missing or malformed, or a setting out of range.
        """
        if window < NGRAM:
            raise UserError(f"evaluation_window={window} must be at least {NGRAM} words")
        if not 0 < fraction <= 1:
            raise UserError(f"evaluation_fraction={fraction} must be above 0 and at most 1")
        for path in (*files, *titles):
            if not path.is_file():
                raise UserError(f"{path}: there is no such evaluation file")
        listed = {entry for path in titles for entry in _titles(path)}
        return cls(
            _identity(files, titles, (NGRAM, window, fraction)), window, fraction,
            frozenset(title for number, title in listed if not number),
            frozenset(title for number, title in listed if number),
            *_index(pair for path in files for pair in _texts(path)),
        )  # fmt: skip

    def hit(self, text: str, meta: Mapping[str, Any] | str | None) -> str | None:
        """The reason why a document is dropped, in one line; None if it is kept.

        Args:
            text: the document.
            meta: its metadata, or their JSON; may hold them under the key "meta".
        """
        return self._listed(_flat(meta)) or self._overlap(text)

    def _listed(self, meta: Mapping[str, Any]) -> str | None:
        for key in TITLE_KEYS:
            if (title := normalised(str(meta.get(key) or ""))) and title in self.titles:
                return f'title "{meta[key]}" is listed'
        found = EBOOK.search(str(meta.get("url") or ""))
        if found and str(int(found[1])) in self.ebooks:
            return f"Project Gutenberg number {int(found[1])} is listed"
        return None

    def _overlap(self, text: str) -> str | None:
        if not len(self.grams):
            return None
        total, places, hashes = 0, [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
        for grams in _grams(text):
            maybe = _in_table(self.table, grams)
            places.append(maybe + total)
            hashes.append(grams[maybe])
            total += len(grams)
        span = min(self.window - NGRAM + 1, total)
        needed = self.fraction * span - 1e-9
        at, found = np.concatenate(places), np.concatenate(hashes)
        if not span or len(at) < needed:
            return None
        index = np.minimum(np.searchsorted(self.grams, found), len(self.grams) - 1)
        real = self.grams[index] == found
        at, index = at[real], index[real]
        counts = np.searchsorted(at, at + span) - np.arange(len(at))
        if not len(at) or counts.max() < needed:
            return None
        first = int(counts.argmax())  # some best window begins at a shared 13-gram
        start, count = min(int(at[first]), total - span), int(counts[first])
        owner = self.names[int(np.bincount(self.owners[index[first : first + count]]).argmax())]
        words = f"words {start:,} to {start + span + NGRAM - 1:,}"
        return f"{count:,} of the {span:,} {NGRAM}-grams of {words} are in {owner}"


def normalised(title: str) -> str:
    """The words of a title, without case and punctuation."""
    folded = unicodedata.normalize("NFKC", title).casefold().replace("_", " ")
    return " ".join(re.findall(r"\w+", folded))


def _flat(meta: Mapping[str, Any] | str | None) -> Mapping[str, Any]:
    if isinstance(meta, str):
        try:
            meta = json.loads(meta)
        except ValueError:
            return {}
    if not isinstance(meta, Mapping):
        return {}
    return {**meta, **_flat(meta["meta"])} if "meta" in meta else meta


def _identity(files: Sequence[Path], titles: Sequence[Path], settings: tuple[float, ...]) -> str:
    digest = hashlib.sha256(repr(settings).encode())
    for kind, paths in (("text", files), ("title", titles)):
        hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        digest.update("".join(f"{kind} {content}\n" for content in sorted(hashes)).encode())
    return digest.hexdigest()


def _index(
    texts: Iterable[tuple[str, str]],
) -> tuple[Hashes, NDArray[np.int32], tuple[str, ...], NDArray[np.uint8]]:
    """`grams`, `owners`, `names` and `table` of an `Evaluation`."""
    names: list[str] = []
    grams, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)]
    for name, text in texts:
        for part in _grams(text):
            grams.append(part)
            owners.append(np.full(len(part), len(names), np.int32))
        names.append(name)
    unique, first = np.unique(np.concatenate(grams), return_index=True)
    return unique, np.concatenate(owners)[first], tuple(names), _bit_table(unique)


def _bit_table(grams: Hashes) -> NDArray[np.uint8]:
    """A bit table of a power of two, at least 16 bits per hash; each hash sets two of them."""
    table = np.zeros(1 << max(13, (2 * len(grams)).bit_length()), np.uint8)
    for turn in (1, 2):
        np.bitwise_or.at(table, *_bits(grams, len(table), turn))
    return table


def _bits(grams: Hashes, size: int, turn: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Byte of the table and bit in it for each hash; turn 2 uses other bits of the hash."""
    place = (grams >> np.uint64(64 - turn * (size.bit_length() - 1))) & np.uint64(size - 1)
    bit = (grams >> np.uint64(3 * turn)).astype(np.uint8) & np.uint8(7)
    return place.view(np.int64), np.uint8(1) << bit


def _in_table(table: NDArray[np.uint8], grams: Hashes) -> NDArray[np.int64]:
    """Indices of the hashes that may be in the table: all that are, and about 1% of the others."""
    place, bit = _bits(grams, len(table), 1)
    once = np.flatnonzero((table[place] & bit) != 0)
    place, bit = _bits(grams[once], len(table), 2)
    twice: NDArray[np.int64] = once[(table[place] & bit) != 0]
    return twice


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of each evaluation text in a file."""
    if path.suffix not in (".jsonl", ".txt"):
        raise UserError(f"{path}: evaluation texts are .jsonl or .txt files")
    try:
        if path.suffix == ".txt":
            yield path.name, path.read_text("utf-8")
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                yield f"{path.name}:{number}", str(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}: not UTF-8 JSON lines with a "text" field ({error!r})') from error


def _titles(path: Path) -> Iterator[tuple[bool, str]]:
    """(False, normalised title) and (True, Project Gutenberg number) for every row."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except ValueError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from error
    table = path.suffix == ".csv"
    for row in csv.reader(lines) if table else ([line, line] for line in lines):
        number, title = (*row, "", "")[:2]
        if number.strip().isdecimal():
            yield True, str(int(number))
        elif table:  # the header row
            continue
        if title := normalised(title):
            yield False, title
