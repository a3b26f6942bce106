"""The counts come out even, and the table shows them."""

from pathlib import Path

import numpy as np

from longctx.data_prep.summary import DUPLICATE, KEPT, SHOWN, TOO_SHORT, Summary, draw, table


def filled() -> Summary:
    summary = Summary("id", {"min_tokens": 8})
    bad = {"not_json": 2, "truncated_archive": 1}
    summary.add_report({
        "records": 12, "other_domain": 2, "domains": ["book", "c4"],
        "counts": {"bad": bad, "too_few_bytes": {"c4": 1}}, "hits": [{"domain": "book"}],
    })  # fmt: skip
    summary.add_documents(
        ["book", "c4"], np.array([0, 1, 0, 1, 0]), np.array([8, 7, 1 << 40, 9, 8]),
        np.array([KEPT, TOO_SHORT, KEPT, KEPT, DUPLICATE], np.uint8),
    )  # fmt: skip
    return summary


def test_every_record_is_accounted_for() -> None:
    found = filled().as_dict()
    inside = sum(part["documents"]["in"] for part in found["domains"].values())
    assert found["records"] == inside + found["other_domain"] + sum(found["bad"]["kinds"].values())
    assert found["total"]["documents"] == {
        "in": 7, "kept": 3, "too_short": 1, "duplicate": 1, "evaluation": 1, "too_few_bytes": 1,
    }  # fmt: skip
    assert found["total"]["tokens"]["in"] == (1 << 40) + 8 + 7 + 9 + 8
    assert found["total"]["tokens"]["kept"] == (1 << 40) + 8 + 9


def test_lengths_are_binned_exactly() -> None:
    lengths = filled().as_dict()["total"]["lengths"]
    rows = list(zip(lengths["from"], lengths["before"], lengths["after"], strict=True))
    assert [row for row in rows if row[1]] == [(4, 1, 0), (8, 3, 2), (1 << 40, 1, 1)]
    assert sum(lengths["tokens_after"]) == (1 << 40) + 8 + 9
    assert lengths["tokens_before"][3] == 25


def test_the_table_has_straight_columns() -> None:
    summary = filled()
    summary.show({"file": "a.jsonl", "line": 3, "kind": "not_json", "note": "oops"})
    text = table(summary.as_dict())
    block = text.split("\n\n")[0].splitlines()
    assert len({len(row) for row in block}) == 1
    assert block[0].split() == [
        "domain", "documents", "evaluation", "too_few_bytes", "too_short", "duplicate", "kept",
        "tokens", "kept", "share",
    ]  # fmt: skip
    assert block[1].split()[:7] == ["book", "4", "1", "0", "0", "1", "2"]
    assert "8 to 15" in text
    assert "3 records cannot be read: 2 not_json, 1 truncated_archive" in text
    assert "  a.jsonl:3: not_json (oops)" in text
    assert "2 records of other domains" in text


def test_reasons_that_never_occur_have_no_column() -> None:
    summary = Summary("id", {})
    summary.add_documents(["a"], np.zeros(1, int), np.array([5]), np.zeros(1, np.uint8))
    header = table(summary.as_dict()).splitlines()[0]
    assert header.split() == ["domain", "documents", "kept", "tokens", "kept", "share"]


def test_broken_archives_are_named_first_and_all() -> None:
    summary = Summary("id", {})
    for i in range(2 * SHOWN):
        kind = "truncated_archive" if i % 2 else "not_json"
        summary.show({"file": "f", "line": i, "kind": kind, "note": ""})
    kinds = [bad["kind"] for bad in summary.shown]
    assert kinds == ["truncated_archive"] * SHOWN
    assert [bad["line"] for bad in summary.shown] == list(range(1, 2 * SHOWN, 2))


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    draw(filled(), tmp_path / "a.png")
    draw(Summary("id", {}), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
