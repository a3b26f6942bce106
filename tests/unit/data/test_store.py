"""The token store: what is written is read back, and damage is named."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from longctx.data.store import Store, StoreWriter, main, tokenizer_sha256
from longctx.errors import UserError

DOCUMENTS = [[1, 5, 6, 2], [1, 2], [1, *range(3, 300), 2]]


def write(path: Path, documents: list[list[int]], vocab_size: int = 1000) -> Path:
    writer = StoreWriter(path, "a" * 64, vocab_size, bos_id=1, eos_id=2, source={"input": "x"})
    with writer:
        for document in documents:
            writer.add(document)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write(tmp_path / "store", DOCUMENTS)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_round_trip(store: Path) -> None:
    read = Store(store)
    assert [read.tokens(i).tolist() for i in range(len(read))] == DOCUMENTS
    assert read.lengths.dtype == np.int64
    assert read.lengths.tolist() == [4, 2, 299]
    assert read.tokens(2, 3, 6).tolist() == [5, 6, 7]
    assert read.tokens(0, 2).tolist() == [6, 2]
    assert read.meta["documents"] == 3
    assert read.meta["tokens"] == 305
    assert read.meta["source"] == {"input": "x"}
    assert not read.tokens(0).flags.writeable
    assert not store.with_name("store.tmp").exists()


def test_files_are_in_datatrove_format(store: Path) -> None:
    flat = np.fromfile(store / "tokens.ds", dtype="<u2")
    assert flat.tolist() == [token for document in DOCUMENTS for token in document]
    assert np.fromfile(store / "tokens.ds.index", dtype="<u8").tolist() == [4, 6, 305]


@pytest.mark.parametrize("vocab_size", [1000, 100_000])
def test_datatrove_reads_it(tmp_path: Path, vocab_size: int) -> None:
    from datatrove.pipeline.tokens.merger import load_doc_ends
    from datatrove.utils.dataset import DatatroveFolderDataset

    path = write(tmp_path / "store", DOCUMENTS, vocab_size)
    size = 2 if vocab_size <= 65_536 else 4
    rows = DatatroveFolderDataset(str(path), 7, token_size=size, return_positions=True)
    assert len(rows) == 305 // 8
    got = [token for i in range(len(rows)) for token in rows[i]["input_ids"].tolist()]
    assert got == [token for document in DOCUMENTS for token in document][: len(got)]
    assert rows[0]["positions"].tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert load_doc_ends((path / "tokens.ds.index").open("rb")).tolist() == [4, 6, 305]


@pytest.mark.parametrize(("vocab_size", "bytes_each"), [(65_536, 2), (65_537, 4)])
def test_width_follows_the_vocabulary(tmp_path: Path, vocab_size: int, bytes_each: int) -> None:
    top = vocab_size - 1
    path = write(tmp_path / "s", [[1, top, 2]], vocab_size)
    assert (path / "tokens.ds").stat().st_size == 3 * bytes_each
    assert Store(path).tokens(0).tolist() == [1, top, 2]


def test_empty_store(tmp_path: Path) -> None:
    read = Store(write(tmp_path / "s", []))
    read.verify()
    assert len(read) == 0


def test_same_documents_same_digest(tmp_path: Path, store: Path) -> None:
    again = Store(write(tmp_path / "again", DOCUMENTS))
    other = Store(write(tmp_path / "other", DOCUMENTS[:2]))
    assert again.meta["digest"] == Store(store).meta["digest"] != other.meta["digest"]


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ([5, 2], "start with BOS"),
        ([1, 5], "end with EOS"),
        ([1], "start with BOS"),
        ([1, 1000, 2], "token 1000"),
        ([1, -1, 2], "token -1"),
    ],
)
def test_bad_document_leaves_nothing(tmp_path: Path, document: list[int], says: str) -> None:
    with pytest.raises(UserError, match=f"document 1: .*{says}"):
        write(tmp_path / "s", [[1, 2], document])
    assert list(tmp_path.iterdir()) == []


def test_existing_store_is_kept_and_leftover_removed(tmp_path: Path, store: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        write(store, [[1, 2]])
    assert len(Store(store)) == 3
    leftover = tmp_path / "new.tmp"
    leftover.mkdir()
    (leftover / "junk").write_text("x")
    write(tmp_path / "new", [[1, 2]])
    assert not leftover.exists()
    assert not (tmp_path / "new" / "junk").exists()


def test_flipped_byte_is_named_on_first_read(store: Path) -> None:
    flip(store / "tokens.ds", 2 * (4 + 2 + 50))
    read = Store(store)
    assert read.tokens(0).tolist() == DOCUMENTS[0]
    with pytest.raises(UserError, match=r"tokens\.ds: document 2 is corrupt"):
        read.tokens(2, 0, 3)
    with pytest.raises(UserError, match="document 2"):
        read.verify()


def test_verify_sees_a_changed_index(store: Path) -> None:
    ends = np.array([4, 6, 305], dtype="<u8")
    ends[0] = 3
    ends.tofile(store / "tokens.ds.index")
    with pytest.raises(UserError):
        Store(store).verify()


def test_verify_sees_a_changed_digest(store: Path) -> None:
    meta = json.loads((store / "meta.json").read_text())
    (store / "meta.json").write_text(json.dumps(meta | {"digest": "0" * 64}))
    with pytest.raises(UserError, match="digest"):
        Store(store).verify()


@pytest.mark.parametrize("name", ["tokens.ds", "tokens.ds.index", "tokens.ds.crc"])
def test_truncated_or_missing_file(store: Path, name: str) -> None:
    path = store / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{name} has .* bytes"):
        Store(store)
    path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        Store(store)


def test_not_a_store(tmp_path: Path, store: Path) -> None:
    with pytest.raises(UserError, match="no such token store"):
        Store(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a token store"):
        Store(tmp_path)
    (store / "meta.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="format 1"):
        Store(store)


def test_foreign_tokenizer_names_both(store: Path) -> None:
    read = Store(store)
    read.require_tokenizer("a" * 64, "the model")
    with pytest.raises(UserError) as error:
        read.require_tokenizer("b" * 64, "models/other")
    for part in (str(store), "models/other", "a" * 12, "b" * 12):
        assert part in str(error.value)


def test_tokenizer_hash_follows_the_file_not_the_folder(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text("{}" if name != "c" else "{ }")
    first = tokenizer_sha256(tmp_path / "a")
    assert first == tokenizer_sha256(str(tmp_path / "b")) != tokenizer_sha256(tmp_path / "c")
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"pieces")
    assert tokenizer_sha256(tmp_path / "a") != first
    assert tokenizer_sha256(tmp_path / "a") == tokenizer_sha256(tmp_path / "a" / "tokenizer.model")
    with pytest.raises(UserError, match="no tokenizer here"):
        tokenizer_sha256(tmp_path)


def test_command_line(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [sys.executable, "-m", "longctx.data.store", "verify", str(store)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ok: 3 documents, 305 tokens, digest ")
    flip(store / "tokens.ds", 0)
    assert main(["verify", str(store)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
