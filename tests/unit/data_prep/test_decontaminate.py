"""Planted evaluation texts are found, quotations are not, and title lists in all their forms."""

import json
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest

from longctx.data_prep import decontaminate
from longctx.data_prep.decontaminate import Evaluation, normalised
from longctx.errors import UserError


def prose(seed: int, words: int) -> list[str]:
    """Words of a text that shares 13-grams with no other seed's."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(words)]


EVALUATION = prose(1, 5000)
OTHER = prose(2, 20_000)


def evaluation(folder: Path, window: int = 1000, fraction: float = 0.8) -> Evaluation:
    file = folder / "test.jsonl"
    rows = [{"text": " ".join(prose(9, 300))}, {"text": " ".join(EVALUATION)}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Evaluation.load([file], [], window, fraction)


def test_a_copy_is_found_and_named(tmp_path: Path) -> None:
    made = evaluation(tmp_path)
    hit = made.hit(" ".join(EVALUATION), {})
    assert hit == "988 of the 988 13-grams of words 0 to 1,000 are in test.jsonl:2"
    assert made.hit(" ".join(OTHER), {}) is None
    assert made.hit("", {}) is None


def test_wraps_case_and_punctuation_do_not_matter(tmp_path: Path) -> None:
    made = evaluation(tmp_path)
    copy = OTHER[:4000] + EVALUATION[1000:2500] + OTHER[4000:]
    marks = [" ", "\n", "\r\n", ", ", '. "', " - ", "\u2014", "\u201d \u201c", "\u2019", "\u2026 "]
    rng = random.Random(3)
    text = "".join(rng.choice([w, w.upper(), w.title()]) + rng.choice(marks) for w in copy)
    hit = made.hit(text, {})
    assert hit is not None
    start = int(re.search(r"words ([\d,]+) to", hit)[1].replace(",", ""))
    assert 4000 - 200 <= start <= 4500 + 200
    assert made.hit(text.replace("\n", " ").lower(), {}) is not None


def test_a_quotation_in_a_long_document_stays(tmp_path: Path) -> None:
    text = " ".join(OTHER[:4000] + EVALUATION[100:400] + OTHER[4000:])
    assert evaluation(tmp_path).hit(text, {}) is None
    small = evaluation(tmp_path, window=200).hit(text, {})
    assert small == "188 of the 188 13-grams of words 4,000 to 4,200 are in test.jsonl:2"
    assert evaluation(tmp_path, window=1000, fraction=0.29).hit(text, {}) is not None


def test_a_short_document_is_one_window(tmp_path: Path) -> None:
    made = evaluation(tmp_path)
    assert made.hit(" ".join(EVALUATION[50:100]), {}) is not None
    assert made.hit(" ".join(EVALUATION[50:63]), {}) is not None  # one 13-gram
    assert made.hit(" ".join(EVALUATION[50:62]), {}) is None  # none
    assert made.hit(" ".join(EVALUATION[50:90] + OTHER[:40]), {}) is None


@pytest.mark.parametrize("copied", [802, 803])
def test_the_threshold_is_exact(tmp_path: Path, copied: int) -> None:
    # 803 copied words have 791 13-grams, the least number that is 0.8 of 988
    text = " ".join(OTHER[:3000] + EVALUATION[:copied] + OTHER[3000:])
    assert (evaluation(tmp_path).hit(text, {}) is not None) == (copied == 803)


def test_the_threshold_is_not_missed_by_rounding(tmp_path: Path) -> None:
    assert 0.07 * 100 > 7  # in floating point
    text = " ".join(OTHER[:500] + EVALUATION[:19] + OTHER[500:1000])  # 7 shared 13-grams
    assert evaluation(tmp_path, window=112, fraction=0.07).hit(text, {}) is not None
    assert evaluation(tmp_path, window=112, fraction=0.08).hit(text, {}) is None


def test_a_copy_at_the_end_is_in_the_last_window(tmp_path: Path) -> None:
    text = " ".join(OTHER[:3000] + EVALUATION[:850])
    hit = evaluation(tmp_path).hit(text, {})
    assert hit == "838 of the 988 13-grams of words 2,850 to 3,850 are in test.jsonl:2"


def definition(made: list[set[tuple[str, ...]]], text: str, window: int) -> int:
    """The largest number of shared 13-grams in a window, by the definition."""
    words = re.findall(r"[a-z0-9\u0080-\U0010ffff]+", text.lower())
    grams = [tuple(words[i : i + 13]) in made[0] for i in range(len(words) - 12)]
    span = min(window - 12, len(grams))
    return max((sum(grams[i : i + span]) for i in range(len(grams) - span + 1)), default=0)


@pytest.mark.parametrize("slab", [50, 1000, 1 << 18])
def test_counts_are_those_of_the_definition(
    tmp_path: Path, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decontaminate, "SLAB_BYTES", slab)
    made = evaluation(tmp_path, window=100, fraction=0.01)
    texts = [EVALUATION, prose(9, 300)]
    grams = [{tuple(t[i : i + 13]) for t in texts for i in range(len(t) - 12)}]
    rng = random.Random(5)
    for _ in range(30):
        words: list[str] = []
        while len(words) < 600:
            source, start = rng.choice([EVALUATION, OTHER]), rng.randrange(4000)
            words += source[start : start + rng.randrange(5, 80)]
        text = rng.choice([" ", "\n", "...\n  "]).join(words)
        counted = int((made.hit(text, {}) or "0").split()[0].replace(",", ""))
        assert counted == definition(grams, text, 100)


def test_long_words_and_other_scripts(tmp_path: Path) -> None:
    words = ["x" * n + str(n) + "\u00e9" * (n % 3) + "y" * n for n in range(2, 28)]
    file = tmp_path / "a.txt"
    file.write_text(" ".join(words), encoding="utf-8")
    made = Evaluation.load([file], [], 1000, 0.8)
    assert made.hit("\n".join(words).upper().replace("\u00c9", "\u00e9"), {}) is not None
    for i in range(0, 26, 12):
        words[i] = words[i][:-1] + "z"
    assert made.hit(" ".join(words), {}) is None


def test_without_evaluation_files_nothing_is_dropped() -> None:
    made = Evaluation.load([], [], 1000, 0.8)
    assert made.hit(" ".join(OTHER), {"title": "", "url": ""}) is None
    assert made.hit("", None) is None


TITLES = [
    {"short_book_title": "The Whale; Or, Moby Dick"},
    {"title": "THE WHALE or MOBY-DICK"},
    {"title": "unlisted", "url": "http://www.gutenberg.org/ebooks/2701"},
    {"url": "https://www.gutenberg.org/files/2701/2701-0.txt"},
    {"meta": {"short_book_title": "the whale, or moby dick"}},
    {"meta": json.dumps({"url": "http://www.gutenberg.org/ebooks/2701"})},
]
FREE = [
    {},
    {"title": "The Whale"},
    {"title": None, "url": None},
    {"url": "http://www.gutenberg.org/ebooks/27010"},
    {"url": "https://example.org/2701"},
    {"short_book_title": ""},
    {"meta": "not JSON"},
]


@pytest.mark.parametrize("name", ["titles.txt", "metadata.csv"])
def test_titles_and_numbers(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name == "titles.txt":
        file.write_text("The whale, or Moby Dick\n\n2701\n")
    else:
        file.write_text(
            "_id,short_book_title,publication_date,url\n"
            '2701,"The Whale, or Moby Dick",1851,http://www.gutenberg.org/ebooks/2701\n'
            "10,Unrelated,1611,http://www.gutenberg.org/ebooks/10\n"
        )
    made = Evaluation.load([], [file], 1000, 0.8)
    for meta in TITLES:
        assert "listed" in (made.hit("text", meta) or "")
        assert "listed" in (made.hit("text", json.dumps(meta)) or "")
    for meta in FREE:
        assert made.hit("text", meta) is None
    assert made.hit("text", {"title": "short book title"}) is None
    assert made.hit("text", TITLES[0]) == 'title "The Whale; Or, Moby Dick" is listed'
    assert made.hit("text", TITLES[3]) == "Project Gutenberg number 2701 is listed"


def test_normalised() -> None:
    assert (
        normalised("  L'\u00c9t\u00e9 _of_ \uff11\uff19\uff16\uff14! ") == "l \u00e9t\u00e9 of 1964"
    )


def test_identity_is_of_contents_and_settings(tmp_path: Path) -> None:
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("one")
    b.write_text("two")
    load = Evaluation.load
    base = load([a, b], [], 1000, 0.8).identity
    assert load([b, a], [], 1000, 0.8).identity == base
    moved = tmp_path / "c.txt"
    moved.write_text("one")
    assert load([moved, b], [], 1000, 0.8).identity == base
    others = [
        load([a], [], 1000, 0.8), load([a], [b], 1000, 0.8), load([], [a, b], 1000, 0.8),
        load([a, b], [], 999, 0.8), load([a, b], [], 1000, 0.7),
    ]  # fmt: skip
    assert len({base, *(other.identity for other in others)}) == 6


def test_survives_pickling(tmp_path: Path) -> None:
    made = evaluation(tmp_path)
    again = pickle.loads(pickle.dumps(made))
    text = " ".join(EVALUATION)
    assert again.hit(text, {}) == made.hit(text, {}) is not None
    assert again.identity == made.identity


def test_no_hash_collides_here(tmp_path: Path) -> None:
    made = evaluation(tmp_path)
    assert len(made.grams) == (5000 - 12) + (300 - 12)
    assert (np.diff(made.grams.astype(object)) > 0).all()


def test_mistakes_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("x")
    wrong = tmp_path / "a.parquet"
    wrong.write_text("x")
    lines = tmp_path / "a.jsonl"
    for arguments, message in [
        (([file], [], 12, 0.8), "evaluation_window=12 must be at least 13 words"),
        (([file], [], 100, 0.0), "evaluation_fraction=0.0 must be above 0"),
        (([file], [], 100, 1.5), "evaluation_fraction=1.5"),
        (([tmp_path / "b.txt"], [], 100, 0.8), r"b\.txt: there is no such evaluation file"),
        (([], [tmp_path / "b.txt"], 100, 0.8), r"b\.txt: there is no such evaluation file"),
        (([wrong], [], 100, 0.8), r"are \.jsonl or \.txt files"),
    ]:
        with pytest.raises(UserError, match=message):
            Evaluation.load(*arguments)
    for line in ('{"txt": "x"}', "[1]", "{", '"\xff'):
        lines.write_bytes(line.encode("latin-1"))
        with pytest.raises(UserError, match=r"a\.jsonl: not UTF-8 JSON lines"):
            Evaluation.load([lines], [], 100, 0.8)
    file.write_bytes(b"\xff\xff")
    with pytest.raises(UserError, match="UTF-8"):
        Evaluation.load([], [file], 100, 0.8)
