"""Figures of stores whose lengths are known, and that no token is read for them."""

import json
from pathlib import Path

import numpy as np
import pytest

from longctx.data.store import StoreWriter
from longctx.data_prep.stats import beyond, describe, find_stores, main, markdown, summarise
from longctx.errors import UserError


def store(path: Path, lengths: list[int]) -> Path:
    writer = StoreWriter(path, tokenizer_sha256="0", vocab_size=100, bos_id=1, eos_id=2, source={})
    with writer:
        for length in lengths:
            writer.add([1, *[5] * (length - 2), 2])
    return path


def test_closed_form(tmp_path: Path) -> None:
    (lengths,) = find_stores([store(tmp_path / "s", [3, 4, 7, 8, 5096, 40_000])]).values()
    made = describe(lengths)
    total = 3 + 4 + 7 + 8 + 5096 + 40_000
    assert (made["documents"], made["tokens"], made["max"]) == (6, total, 40_000)
    assert (made["mean"], made["median"]) == (pytest.approx(total / 6), 7.5)
    assert made["histogram"] == [
        {"from": 2, "documents": 1, "tokens": 3},
        {"from": 4, "documents": 2, "tokens": 11},
        {"from": 8, "documents": 1, "tokens": 8},
        {"from": 4096, "documents": 1, "tokens": 5096},
        {"from": 32768, "documents": 1, "tokens": 40_000},
    ]
    assert made["beyond"] == {
        "4096": (1000 + 40_000 - 4096) / total,
        "8192": (40_000 - 8192) / total,
        "32768": (40_000 - 32_768) / total,
        "131072": 0.0,
    }


def test_beyond_is_its_definition() -> None:
    lengths = np.random.default_rng(0).integers(2, 300, 500)
    positions = [0, 1, 2, 100, 150, 299, 300, 1000]
    wanted = [np.maximum(lengths - at, 0).sum() / lengths.sum() for at in positions]
    assert beyond(lengths, positions) == pytest.approx(wanted)


@pytest.mark.parametrize("length", [2, 3, 4, 1023, 1024, 1025, 1 << 20, (1 << 40) - 1, 1 << 40])
def test_buckets_begin_at_powers_of_two(length: int) -> None:
    (row,) = describe(np.array([length]))["histogram"]
    assert row["from"] <= length < 2 * row["from"]


def test_domains_of_a_folder(tmp_path: Path) -> None:
    store(tmp_path / "out" / "book", [10, 20])
    store(tmp_path / "out" / "arxiv", [70])
    store(tmp_path / "more" / "book", [100])
    domains = find_stores([tmp_path / "out", tmp_path / "more" / "book"])
    assert {name: x.tolist() for name, x in domains.items()} == {
        "arxiv": [70],
        "book": [10, 20, 100],
    }
    made = summarise(domains)
    assert {name: part["share"] for name, part in made["domains"].items()} == {
        "arxiv": 0.35,
        "book": 0.65,
    }
    assert made["all"]["tokens"] == 200


def test_no_token_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store(tmp_path / "s", [10, 20])
    (path / "tokens.ds").write_bytes(bytes(60))  # nothing but zeros: every CRC32 differs
    assert find_stores([path])["s"].tolist() == [10, 20]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store(tmp_path / "out" / "book", [5096, 20])
    store(tmp_path / "out" / "arxiv", [7])
    assert main([str(tmp_path / "out"), "--output", str(tmp_path / "made")]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "made" / "stats.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    assert rows[0][:4] == ["domain", "documents", "tokens", "share"]
    assert rows[2] == ["arxiv", "1", "7", "0.1%", "7", "7", "7", *["0.0%"] * 4]
    assert rows[4][:4] == ["all", "3", "5,123", "100.0%"]
    assert rows[4][7] == "19.5%"
    assert ["4,096 to 8,191", "1", "33.3%", "5,096", "99.5%"] in rows
    saved = json.loads((tmp_path / "made" / "stats.json").read_text())
    assert saved["domains"]["book"]["documents"] == 2
    assert (tmp_path / "made" / "stats.png").read_bytes().startswith(b"\x89PNG")


def test_an_empty_store(tmp_path: Path) -> None:
    made = summarise(find_stores([store(tmp_path / "s", [])]))
    assert made["all"]["documents"] == made["all"]["tokens"] == made["all"]["max"] == 0
    assert "| s " in markdown(made)
    assert main([str(tmp_path / "s"), "--output", str(tmp_path / "made")]) == 0


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    path = store(tmp_path / "s", [10])
    (path / "tokens.ds").unlink()
    with pytest.raises(UserError, match=r"tokens\.ds is missing"):
        find_stores([path])
    (tmp_path / "file").write_text("")
    good = store(tmp_path / "good", [10])
    assert main([str(good), "--output", str(tmp_path / "file")]) == 2
    assert "cannot write there" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([])
