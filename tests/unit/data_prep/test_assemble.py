"""What is kept: long enough, the first of equals, not evaluated on; and what stops a run."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from longctx.data.store import TOKENS, Store
from longctx.data_prep import assemble
from longctx.data_prep.encode import Encoder, load_encoder
from longctx.data_prep.filter_redpajama import plan
from longctx.data_prep.settings import FilterConfig
from longctx.data_prep.work import Work
from longctx.errors import UserError
from tests.helpers.raw import TOKENIZER, config, digests, line, run_here, summary, text_of, write


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(TOKENIZER)


def lengths(output: Path, domain: str) -> list[int]:
    return [int(n) for n in Store(output / domain).lengths]


def documents(output: Path, domain: str) -> list[list[int]]:
    store = Store(output / domain)
    store.verify()
    return [store.tokens(i).tolist() for i in range(len(store))]


def test_the_threshold_counts_both_ends(tmp_path: Path, encoder: Encoder) -> None:
    texts = [text_of(n, encoder) for n in (63, 64, 65)]
    write(tmp_path / "raw" / "book" / "a.jsonl", *map(line, texts))
    write(tmp_path / "raw" / "c4" / "a.jsonl.zst", *(line(text + "!") for text in texts))
    run_here(config(tmp_path / "raw", tmp_path / "out", min_tokens=64, min_tokens_of={"c4": 66}))
    expected = [ids.tolist() for ids in encoder.documents(texts)[1:]]
    assert documents(tmp_path / "out", "book") == expected
    assert lengths(tmp_path / "out", "c4") == [66]
    assert summary(tmp_path / "out")["domains"]["c4"]["documents"] == {
        "in": 3, "kept": 1, "too_short": 2,
    }  # fmt: skip


def test_the_first_of_equals_stays(tmp_path: Path, encoder: Encoder) -> None:
    a, b, short = (text_of(n, encoder) for n in (40, 41, 20))
    write(tmp_path / "raw" / "arxiv" / "a.jsonl", line(a), line(short), line(b), line(a))
    write(tmp_path / "raw" / "book" / "a.jsonl", line(b), line(short), line(short))
    rules = {"min_tokens": 30, "min_tokens_of": {"books": 10}}
    run_here(config(tmp_path / "raw", tmp_path / "out", **rules))
    assert lengths(tmp_path / "out", "arxiv") == [40, 41]
    assert lengths(tmp_path / "out", "book") == [20]  # the first of its text that is long enough
    again = {"deduplicate": False, "work": str(tmp_path / "out.work")}
    assert run_here(config(tmp_path / "raw", tmp_path / "all", **rules | again)) == []
    assert lengths(tmp_path / "all", "arxiv") == [40, 41, 40]
    assert lengths(tmp_path / "all", "book") == [41, 20, 20]


def test_evaluation_documents_are_dropped_and_named(tmp_path: Path) -> None:
    words = [f"w{i * i}" for i in range(300)]
    test = write(tmp_path / "test.jsonl", line(" ".join(words)))
    titles = tmp_path / "titles.txt"
    titles.write_text("Moby Dick\n")
    raw = tmp_path / "raw" / "book" / "a.jsonl"
    rows = [line(f"other {i} " * 40) for i in range(7)]
    rows[4] = line("Preface. " + " ".join(words).upper())
    rows[6] = line("Call me Ishmael. " * 9, short_book_title="MOBY-DICK")
    write(raw, *rows)
    named = {"evaluation_files": [str(test)], "evaluation_titles": [str(titles)]}
    run_here(config(tmp_path / "raw", tmp_path / "out", split_mib=0.0003, **named))
    dropped = [json.loads(x) for x in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [(x["file"], x["line"], x["domain"]) for x in dropped] == [
        (str(raw), 5, "book"), (str(raw), 7, "book"),
    ]  # fmt: skip
    assert "test.jsonl:1" in dropped[0]["reason"]
    assert 'title "MOBY-DICK"' in dropped[1]["reason"]
    assert len(Store(tmp_path / "out" / "book")) == 5


def test_what_cannot_be_read_is_placed_in_its_file(tmp_path: Path) -> None:
    raw = tmp_path / "raw" / "c4" / "a.jsonl"
    rows = [line("good " * i) for i in range(1, 20)]
    rows[11] = b"{broken\n"
    rows[17] = b"\n"  # a blank line is no record, and still a line
    rows[18] = b'{"text": ""}'
    write(raw, *rows)
    run_here(config(tmp_path / "raw", tmp_path / "out", split_mib=0.0001))
    found = summary(tmp_path / "out")
    assert found["records"] == 18
    assert found["bad"]["kinds"] == {"not_json": 1, "no_text": 1}
    assert [(x["file"], x["line"]) for x in found["bad"]["first"]] == [
        (str(raw), 12), (str(raw), 19),
    ]  # fmt: skip


def test_too_many_bad_records_write_nothing(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw" / "c4" / "a.jsonl", *[line("good")] * 98, b"x\n", b"y\n")
    settings = config(tmp_path / "raw", tmp_path / "out", max_bad_fraction=0.01)
    with pytest.raises(UserError) as error:
        run_here(settings)
    assert str(error.value) == (
        "2 of 100 records cannot be read (2 not_json), more than max_bad_fraction=0.01: nothing "
        f"was written; see {raw}:99 (not_json), {raw}:100 (not_json)"
    )
    assert sorted(x.name for x in tmp_path.iterdir()) == ["out.work", "raw"]
    assert run_here(config(tmp_path / "raw", tmp_path / "out", max_bad_fraction=0.02)) == []


def test_order_and_digests_do_not_depend_on_units(tmp_path: Path) -> None:
    for name in ("arxiv/a", "c4/b", "c4/c"):
        rows = [line(f"{name} {i} " * (i % 17 + 1)) for i in range(60)]
        write(tmp_path / "raw" / f"{name}.jsonl", *rows)
    for output, split in (("one", 1.0), ("two", 0.001), ("three", 0.0037)):
        run_here(config(tmp_path / "raw", tmp_path / output, split_mib=split, min_tokens=20))
    assert digests(tmp_path / "one") == digests(tmp_path / "two") == digests(tmp_path / "three")
    assert len(list((tmp_path / "two.work").glob("*/shards/*"))) > 10


def test_other_settings_have_other_work(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw" / "c4" / "a.jsonl", *(line("word " * i) for i in range(1, 30)))
    other = tmp_path / "tokenizer"
    shutil.copytree(TOKENIZER, other, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((other / "tokenizer_config.json").read_text())
    settings["eos_token"] = settings["bos_token"]
    test = write(tmp_path / "test.jsonl", line("a text"))
    base = {"work": str(tmp_path / "work")}

    def folder(**changes: object) -> str:
        work: Work = plan(config(tmp_path / "raw", tmp_path / "out", **base | changes)).work
        return work.folder.name

    first = folder()
    for same in (
        {"min_tokens": 9}, {"deduplicate": False}, {"workers": 7}, {"max_bad_fraction": 0.5},
        {"min_tokens_of": {"c4": 3}},
    ):  # fmt: skip
        assert folder(**same) == first
    others = [
        folder(evaluation_files=[str(test)]), folder(evaluation_fraction=0.5), folder(min_bytes=9),
        folder(split_mib=0.0001), folder(domains=["c4"]),
    ]  # fmt: skip
    (other / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes() + b" ")
    if (other / "tokenizer.model").exists():
        (other / "tokenizer.model").unlink()
    others.append(folder(tokenizer=str(other)))
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    others.append(folder(tokenizer=str(other)))
    write(raw, line("changed"))
    others.append(folder())
    assert len({first, *others}) == len(others) + 1
    assert not (tmp_path / "work").exists()  # planning writes nothing


@pytest.mark.parametrize("damage", ["flip", "missing", "table"])
def test_a_damaged_shard_is_made_again(damage: str, tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / "raw" / f"{name}.jsonl", *(line(f"{name} " * i) for i in range(1, 40)))
    settings = config(tmp_path / "raw", tmp_path / "out", split_mib=0.0016)
    ranks = run_here(settings)
    expected = digests(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    shard = plan(settings).work.shard(1)
    if damage == "flip":
        data = bytearray((shard / "store" / TOKENS).read_bytes())
        data[40] ^= 1
        (shard / "store" / TOKENS).write_bytes(data)
    elif damage == "table":
        np.save(shard / "table.npy", np.load(shard / "table.npy")[:-1])
    else:
        shutil.rmtree(shard)
    with pytest.raises(UserError, match=r"00001 is damaged .*: the same command tokenises it"):
        run_here(settings)
    assert not (tmp_path / "out").exists()
    assert len(ranks) > 1
    assert not shard.exists()
    assert run_here(settings) == [1]
    assert digests(tmp_path / "out") == expected


def test_runs_that_leave_nothing_say_why(tmp_path: Path) -> None:
    write(tmp_path / "raw" / "c4" / "a.jsonl", line("a b c"), line("a"))
    output = tmp_path / "out"
    for changes, message in (
        ({"min_tokens": 100}, r"no document is left: the longest has \d tokens, see min_tokens"),
        ({"min_tokens_of": {"wiki": 1}}, "domain wikipedia does not occur .* which has c4"),
    ):
        with pytest.raises(UserError, match=message):
            run_here(config(tmp_path / "raw", output, **changes))
        assert not output.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": ["arxiv", "bok"]}, "domain bok does not occur in the input, which has arxiv"),
        ({"min_tokens_of": {"bok": 9}}, "domain bok does not occur in the input, .* arxiv, c4"),
        (
            {"domains": ["arxiv"], "min_tokens_of": {"c4": 9}},
            r"min_tokens_of\.c4: c4 is not one of domains=\['arxiv'\]",
        ),
    ],
)
def test_wrong_domains_are_found_at_once(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    for name in ("arxiv", "c4"):
        write(tmp_path / "raw" / name / "a.jsonl", line("a"))
    with pytest.raises(UserError, match=message):
        plan(config(tmp_path / "raw", tmp_path / "out", **changes))
    write(tmp_path / "raw" / "b.jsonl", line("a"))  # whose records may say what they are
    if "domains" not in changes or "min_tokens_of" not in changes:
        plan(config(tmp_path / "raw", tmp_path / "out", **changes))


@pytest.fixture
def few_files() -> Iterator[Callable[[int | None], None]]:
    """Sets the soft limit to what 20 more files need, and the hard limit that is seen, if any."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    asked = resource.getrlimit
    patch = pytest.MonkeyPatch()

    def limit(seen: int | None) -> None:
        taken = {int(file.name) for file in Path("/proc/self/fd").iterdir()}
        low = [n for n in range(len(taken) + 30) if n not in taken][20]
        resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
        if seen is not None:
            patch.setattr(resource, "getrlimit", lambda kind: (asked(kind)[0], seen))

    yield limit
    patch.undo()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def many(tmp_path: Path) -> FilterConfig:
    rows = [line(f"text {i}", redpajama_set_name=f"d{i}") for i in range(30)]
    write(tmp_path / "raw" / "x.jsonl", *rows)
    return config(tmp_path / "raw", tmp_path / "out")


def test_many_domains_may_open_many_files(
    tmp_path: Path, few_files: Callable[[int | None], None]
) -> None:
    settings = many(tmp_path)
    few_files(None)
    run_here(settings)
    assert len(digests(tmp_path / "out")) == 30


def test_too_many_domains_say_so(tmp_path: Path, few_files: Callable[[int | None], None]) -> None:
    settings = many(tmp_path)
    few_files(300)
    with pytest.raises(UserError, match="30 domains need 346 open files and the system allows 300"):
        run_here(settings)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["out.work", "raw"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(assemble, "draw", full)
    with pytest.raises(OSError, match="disk full"):
        run_here(many(tmp_path))
    assert sorted(x.name for x in tmp_path.iterdir()) == ["out.work", "raw"]


def test_a_finished_shard_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = many(tmp_path)
    run_here(settings)
    job = plan(settings)
    shard = job.work.shard(0)
    before = [(path, path.stat().st_mtime_ns, path.stat().st_ino) for path in shard.rglob("*")]
    job.tokenize.run(rank=0)  # its mark is lost
    seen = iter([False, True])  # two jobs at the same time
    monkeypatch.setattr(Work, "finished", lambda *_: next(seen, True))
    job.tokenize.run(rank=0)
    assert before == [
        (path, path.stat().st_mtime_ns, path.stat().st_ino) for path in shard.rglob("*")
    ]  # fmt: skip
    assert [path.name for path in shard.parent.iterdir()] == ["00000"]


def test_domains_and_bytes_drop_before_the_tokenizer(tmp_path: Path) -> None:
    write(
        tmp_path / "raw" / "x.jsonl",
        *(line("abc" * n, redpajama_set_name=f"RedPajama{name}")
          for n in (1, 5) for name in ("Book", "C4")),
    )  # fmt: skip
    run_here(config(tmp_path / "raw", tmp_path / "out", domains=["books"], min_bytes=15))
    found = summary(tmp_path / "out")
    assert found["other_domain"] == 2
    assert found["domains"]["book"]["documents"] == {"in": 2, "kept": 1, "too_few_bytes": 1}
