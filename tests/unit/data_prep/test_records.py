"""Every line exactly once however files are cut; what cannot be read is counted by kind."""

import gzip
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from longctx.data_prep import records
from longctx.data_prep.inputs import deal, domain_name, find_pieces
from longctx.data_prep.records import Bad, Reader, Record
from longctx.errors import UserError
from tests.helpers.raw import line, write


def read(source: Path | str, split: int = 1 << 20) -> list[Record | Bad]:
    return [record for piece in find_pieces([str(source)], [], split) for record in Reader(piece)]


def texts(source: Path | str, split: int = 1 << 20) -> list[str]:
    return [record.text for record in read(source, split) if isinstance(record, Record)]


def kinds(source: Path) -> list[str]:
    return [record.kind if isinstance(record, Bad) else "ok" for record in read(source)]


bodies = st.lists(st.text(max_size=12), max_size=12)


@given(bodies=bodies, split=st.integers(1, 200), newline=st.booleans(), blank=st.booleans())
def test_byte_ranges_give_each_line_once(
    bodies: list[str], split: int, newline: bool, blank: bool
) -> None:
    data = (b"\n" if blank else b"") + b"".join(line("x" + body) for body in bodies)
    if data and not newline:
        data = data.rstrip(b"\n")
    with TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.jsonl", data)
        pieces = find_pieces([str(path)], [], split) if data else []
        readers = [Reader(piece) for piece in pieces]
        found = [record for reader in readers for record in reader]
        assert [r.text for r in found if isinstance(r, Record)] == ["x" + body for body in bodies]
        assert sum(reader.lines for reader in readers) == len(data.splitlines())
        assert [(p.start, p.stop) for p in pieces] == [
            (at, min(at + split, len(data))) for at in range(0, len(data), split)
        ]


def test_numbers_of_lines_add_up_over_ranges(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *(line("x" * n) for n in range(1, 40)))
    before, numbers = 0, []
    for piece in find_pieces([str(path)], [], 97):
        reader = Reader(piece)
        numbers += [before + record.line for record in reader]
        before += reader.lines
    assert numbers == list(range(1, 40))


BAD_LINES = {
    b"{oops\n": "not_json",
    b'["text"]\n': "wrong_type",
    b'"text"\n': "wrong_type",
    b'{"text": 5}\n': "wrong_type",
    b'{"meta": {}}\n': "no_text",
    b'{"text": ""}\n': "no_text",
    b'{"text": null}\n': "no_text",
    b'{"text": "\xff\xfe"}\n': "invalid_utf8",
    b'{"text": "a \\ud800 b"}\n': "invalid_utf8",
    b'{"text": "a"\n': "not_json",
    b"[" * 100_000 + b"\n": "not_json",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda bad: repr(bad[:24]))
def test_bad_lines_by_kind(bad: bytes, tmp_path: Path) -> None:
    assert kinds(write(tmp_path / "a.jsonl", line("a"), bad, line("b"))) == [
        "ok", BAD_LINES[bad], "ok",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "good",
    [b'{"text": "a", "x": NaN}\n', b'{"text": "a", "x": "\\ud800"}\n', b'\xef\xbb\xbf{"text":"a"}',
     b'{"text": "a", "x": 123456789012345678901234567890}\r\n'],
)  # fmt: skip
def test_lines_that_only_a_strict_parser_refuses(good: bytes, tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.jsonl", good)) == ["a"]


def test_a_line_without_end_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LONGEST_LINE", 1000)
    path = write(tmp_path / "a.jsonl", line("a"), line("b" * 300_000), line("c" * 900))
    assert kinds(path) == ["ok", "line_too_long", "ok"]
    assert [r.line for r in read(path)] == [1, 2, 3]


MEMBERS = [b"".join(line(f"{member} {i} " + "x" * 40) for i in range(30)) for member in range(3)]
SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
ARCHIVES = {
    "gz": b"".join(map(gzip.compress, MEMBERS)) + bytes(512),
    "zst": SKIPPABLE + b"".join(map(zstandard.compress, MEMBERS)),
}
EVERY = [json.loads(part)["text"] for part in b"".join(MEMBERS).splitlines()]


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("block", [1, 7, 1 << 17])
def test_archives_of_many_members(
    kind: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "BLOCK", block)
    (tmp_path / f"a.jsonl.{kind}").write_bytes(ARCHIVES[kind])
    assert texts(tmp_path) == EVERY


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_broken_archive_is_named_wherever_it_breaks(kind: str, tmp_path: Path) -> None:
    data = ARCHIVES[kind].rstrip(b"\0")
    path = tmp_path / f"a.jsonl.{kind}"
    for cut in range(len(data) // 2, len(data), 13):
        path.write_bytes(data[:cut])
        *found, last = read(path)
        good = [r.text for r in found if isinstance(r, Record)]
        assert good == EVERY[: len(good)]
        if isinstance(last, Record):
            assert len(good) + 1 in (30, 60)  # cut between members, it is a whole archive
        else:
            assert (last.kind, last.line) == ("truncated_archive", len(good) + 1)


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_damaged_archive_is_named(kind: str, tmp_path: Path) -> None:
    data = bytearray(ARCHIVES[kind])
    data[len(data) // 2 : len(data) // 2 + 30] = b"\xaa" * 30
    (tmp_path / f"a.jsonl.{kind}").write_bytes(data)
    *_, last = read(tmp_path)
    assert isinstance(last, Bad)
    assert last.kind in ("truncated_archive", "not_json", "invalid_utf8")


@pytest.mark.parametrize(
    ("path", "domain"),
    [
        ("arxiv/arxiv_0.jsonl", "arxiv"),
        ("RedPajama/common_crawl/2019-30/en_head_0000.jsonl", "common_crawl"),
        ("cc/x.jsonl", "common_crawl"),
        ("wiki/x.jsonl", "wikipedia"),
        ("wiki.jsonl", "wikipedia"),
        ("c4-train.00000-of-01024.json.gz", "c4"),
        ("arxiv_ab38c7d4-cd57-4b33-b4a3-9e4b1c0a9d1e.jsonl", "arxiv"),
        ("common_crawl_07.jsonl", "common_crawl"),
        ("book2.jsonl", "book"),
        ("book.jsonl", "book"),
        ("bookshelf.jsonl", "raw"),
        ("book_reviews.jsonl", "raw"),
        ("wiki-talk.jsonl", "raw"),
        ("Novels, old/part/x.jsonl", "novels_old"),
        ("x.jsonl", "raw"),
    ],
)
def test_domain_by_place(path: str, domain: str, tmp_path: Path) -> None:
    write(tmp_path / "raw" / path, line("a"))
    (piece,) = find_pieces([str(tmp_path / "raw")], [], 1 << 20)
    assert piece.domain == domain


@pytest.mark.parametrize(
    "row",
    [
        {"meta": {"redpajama_set_name": "RedPajamaStackExchange"}},
        {"meta": '{"redpajama_set_name": "RedPajamaStackExchange"}'},
        {"meta": "{}", "red_pajama_subset": "stackexchange"},
    ],
)
def test_domain_by_record(row: dict[str, Any], tmp_path: Path) -> None:
    data = json.dumps({"text": "a"} | row).encode() + b"\n"
    (labelled,) = read(write(tmp_path / "chunk1" / "x.jsonl", data))
    assert isinstance(labelled, Record)
    assert labelled.domain == "stackexchange"
    for place in ("arxiv/x.jsonl", "book.jsonl"):  # what a record says of itself comes first
        (placed,) = read(write(tmp_path / place, data))
        assert isinstance(placed, Record)
        assert placed.domain == "stackexchange"


def test_names_of_domains_are_names_of_folders() -> None:
    assert [domain_name(x) for x in ("../..", "A b/c", "RedPajamaCommonCrawl", "BOOKS")] == [
        "text", "a_b_c", "common_crawl", "book",
    ]  # fmt: skip


def test_unwanted_folders_are_not_read(tmp_path: Path) -> None:
    for name in ("arxiv/a", "c4/b", "chunk1/c"):
        write(tmp_path / f"{name}.jsonl", line("a"))
    write(tmp_path / "book_0.jsonl", line("a", redpajama_set_name="RedPajamaArXiv"))
    pieces = find_pieces([str(tmp_path)], ["arxiv"], 1 << 20)
    assert [piece.domain for piece in pieces] == ["arxiv", "book", "chunk1"]
    assert [piece.placed for piece in pieces] == [True, False, False]
    with pytest.raises(UserError, match="none is in the input, which has c4"):
        find_pieces([str(tmp_path / "c4")], ["arxiv"], 1 << 20)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "disk" / "x" / "deep" / "a.jsonl", line("linked"))
    write(tmp_path / "raw" / "c4" / "a.jsonl", line("own"))
    for name, target in (("book", "disk/x"), ("zzz", "disk/x/deep"), ("again", "raw/c4")):
        (tmp_path / "raw" / name).symlink_to(tmp_path / target)
    (tmp_path / "disk" / "x" / "circle").symlink_to(tmp_path / "raw")
    (tmp_path / "raw" / "c4" / "circle").symlink_to(tmp_path / "raw")
    pieces = find_pieces([str(tmp_path / "raw")], [], 1 << 20)
    assert [(piece.domain, piece.path) for piece in pieces] == [
        ("book", str(tmp_path / "raw" / "book" / "deep" / "a.jsonl")),
        ("c4", str(tmp_path / "raw" / "c4" / "a.jsonl")),
    ]  # fmt: skip
    assert texts(tmp_path / "raw") == ["linked", "own"]


def test_a_link_may_lead_to_a_file_without_suffix(tmp_path: Path) -> None:
    write(tmp_path / "blobs" / "0a1b", line("a"))
    link = tmp_path / "snapshots" / "x.jsonl"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "blobs" / "0a1b")
    assert texts(link) == texts(link.parent) == ["a"]
    (tmp_path / "y.jsonl").symlink_to(link)
    with pytest.raises(UserError, match=r"y\.jsonl is in the input twice"):
        find_pieces([str(link), str(tmp_path / "y.jsonl")], [], 1 << 20)


def test_small_files_share_a_unit_and_order_stays(tmp_path: Path) -> None:
    for i in range(10):
        write(tmp_path / f"{i}.jsonl", line("a" * (i * 30)))
    pieces = find_pieces([str(tmp_path)], [], 200)
    units = deal(pieces, 200)
    assert [piece for unit in units for piece in unit] == pieces
    assert all(sum(p.bytes for p in unit) <= 200 for unit in units)
    assert len(units) < len(pieces)


def test_mistakes_in_the_input(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", line("a"))
    (tmp_path / "empty").mkdir()
    for given_, message in (
        ([str(tmp_path / "nope")], "no such file or folder"),
        ([str(tmp_path / "empty")], r"empty contains none of \.jsonl,"),
        ([str(path), str(tmp_path)], "is in the input twice"),
    ):
        with pytest.raises(UserError, match=message):
            find_pieces(given_, [], 1 << 20)
    (piece,) = find_pieces([str(path)], [], 1 << 20)
    piece.check()
    write(path, line("b"), line("c"))
    with pytest.raises(UserError, match="has changed since the run began"):
        piece.check()


def test_datasets_by_shard(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"t{i}", "meta": {"redpajama_set_name": "RedPajamaBook"}} for i in range(20)]
    whole = datasets.Dataset.from_list(rows)
    for i in range(2):
        whole.shard(2, i, contiguous=True).to_parquet(tmp_path / "pq" / f"train-{i}.parquet")
    whole.save_to_disk(tmp_path / "saved", num_shards=4)
    for folder, shards in (("pq", 2), ("saved", 4)):
        pieces = find_pieces([f"hf:{tmp_path / folder}"], [], 1)
        assert [(p.start, p.stop) for p in pieces] == [(i, shards) for i in range(shards)]
        found = [record for piece in pieces for record in Reader(piece)]
        assert [r.text for r in found if isinstance(r, Record)] == [f"t{i}" for i in range(20)]
        assert {r.domain for r in found if isinstance(r, Record)} == {"book"}
    before = find_pieces([f"hf:{tmp_path / 'pq'}"], [], 1)[0].version
    datasets.Dataset.from_list(rows[:3]).to_parquet(tmp_path / "pq" / "train-1.parquet")
    assert find_pieces([f"hf:{tmp_path / 'pq'}"], [], 1)[0].version != before
    datasets.Dataset.from_list([{"content": "a"}]).to_parquet(tmp_path / "odd" / "train.parquet")
    with pytest.raises(UserError, match="has no column text, only content"):
        find_pieces([f"hf:{tmp_path / 'odd'}"], [], 1)
