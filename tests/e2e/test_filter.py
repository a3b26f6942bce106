"""`filter_redpajama.py` as users run it, on a small corpus with everything that goes wrong."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from longctx.data.store import Store
from longctx.data_prep.encode import Encoder, load_encoder
from tests.helpers.entry import run_entry
from tests.helpers.process import start
from tests.helpers.raw import TOKENIZER, digests, line, summary, text_of, write

SCRIPT = "data_prep/filter_redpajama.py"
MIN = 256  # tokens
MILLION = 1_000_000  # characters


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(TOKENIZER)


def prose(seed: int, words: int) -> str:
    return " ".join(f"w{n}" for n in random.Random(seed).choices(range(10_000), k=words))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, encoder: Encoder) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    raw, test = root / "raw", prose(1000, 400)
    write(root / "test.jsonl", line(test))
    near = [text_of(MIN + i, encoder) for i in (-1, 0, 1)]
    write(raw / "arxiv" / "arxiv_0.jsonl", *(line(prose(i, 300)) for i in range(20)))
    write(raw / "book" / "book.jsonl", *map(line, near), line(prose(99, 300)), line(test))
    write(raw / "c4" / "a.jsonl.gz", line(prose(3, 300)), b"{oops\n", line(prose(98, 400)))
    long = ("a fine line of text\n" * (MILLION // 20))[:MILLION]
    write(raw / "github" / "a.jsonl", line(long), line(""), b'{"text": "\xff"}\n')
    write(raw / "wiki" / "a.jsonl.zst", *(line(prose(i, 300)) for i in range(50, 60)))
    broken = write(raw / "cc" / "a.jsonl.gz", *(line(prose(i, 300)) for i in range(60, 90)))
    broken.write_bytes(broken.read_bytes()[:-2000])
    mixed = [
        line(prose(i, 300), redpajama_set_name="RedPajamaStackExchange") for i in range(40, 44)
    ]
    write(raw / "chunk1" / "a.jsonl.zst", *mixed)
    return root


def arguments(corpus: Path, output: Path, **more: object) -> list[str]:
    settings = {
        "input": corpus / "raw", "output": output, "tokenizer": TOKENIZER,
        "evaluation_files": f"[{corpus / 'test.jsonl'}]",
        "evaluation_window": 200, "min_tokens": MIN, "split_mib": 0.1, "max_bad_fraction": 0.1,
    } | more  # fmt: skip
    return [f"{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def done(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    result = run_entry(arguments(corpus, folder / "out", workers=2), folder / "log", script=SCRIPT)
    assert (result.code, result.err) == (0, ""), result.err
    assert result.out.startswith("domain")
    return folder / "out"


def test_what_is_kept(done: Path, encoder: Encoder) -> None:
    for name in digests(done):
        Store(done / name).verify()
        assert Store(done / name).lengths.min() >= MIN
    assert sorted(digests(done)) == [
        "arxiv", "book", "c4", "common_crawl", "github", "stackexchange", "wikipedia",
    ]  # fmt: skip
    assert Store(done / "book").lengths[:2].tolist() == [MIN, MIN + 1]
    long = ("a fine line of text\n" * (MILLION // 20))[:MILLION]
    whole = Store(done / "github").tokens(0)
    assert np.array_equal(whole, encoder.documents([long], piece_characters=2 * MILLION)[0])


def test_everything_is_accounted_for(done: Path, corpus: Path) -> None:
    found = summary(done)
    assert found["bad"]["kinds"] == {
        "not_json": 1, "no_text": 1, "invalid_utf8": 1, "truncated_archive": 1,
    }  # fmt: skip
    documents = found["total"]["documents"]
    assert documents["evaluation"] == documents["too_short"] == documents["duplicate"] == 1
    assert found["records"] == documents["in"] + 4
    (dropped,) = map(json.loads, (done / "dropped.jsonl").read_text().splitlines())
    assert (dropped["file"], dropped["line"]) == (str(corpus / "raw" / "book" / "book.jsonl"), 5)
    places = {(Path(x["file"]).parent.name, x["line"]) for x in found["bad"]["first"]}
    assert {("c4", 2), ("github", 2), ("github", 3)} < places
    assert (done / "summary.png").stat().st_size > 1000


def test_a_killed_run_goes_on_and_gives_the_same(corpus: Path, done: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    given = arguments(corpus, output, workers=1)
    process = start([sys.executable, SCRIPT, *given], tmp_path / "log")
    marks: list[Path] = []
    end = time.monotonic() + 100
    while len(marks) < 2:
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < end
        time.sleep(0.01)
        marks = list((tmp_path / "out.work").glob("*/logs/tokenize/completions/*"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    while _alive(process.pid):  # the workers have noticed
        assert time.monotonic() < end
        time.sleep(0.1)
    assert not output.exists()
    first = {mark: mark.stat().st_mtime_ns for mark in marks}
    assert run_entry(given, tmp_path / "again", script=SCRIPT).code == 0
    assert {mark: mark.stat().st_mtime_ns for mark in first} == first
    tasks = list(next(iter(first)).parent.iterdir())
    assert len(first) < len(tasks)
    assert digests(output) == digests(done)
    assert (output / "summary.json").read_text() == (done / "summary.json").read_text()


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": "/nowhere"}, "input=/nowhere: there is no such file or folder"),
        ({"min_tokens": "many"}, "min_tokens=many: Value 'many' of type 'str' could not be"),
        ({"min_tokens": 9}, "exists already, and not from these inputs and settings: remove it"),
        ({"executor": "condor"}, "executor=condor is not one of local, ray, slurm"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_mistakes_are_one_line(
    changes: dict[str, object], message: str, corpus: Path, done: Path, tmp_path: Path
) -> None:
    before = sorted(done.parent.rglob("*"))
    result = run_entry(arguments(corpus, done, **changes), tmp_path / "log", script=SCRIPT)
    assert message in result.error
    assert result.out == ""
    assert sorted(done.parent.rglob("*")) == before
