"""The stored teacher: what is written is read back, sizes are the formula's, damage is named."""

import json
from dataclasses import replace

import numpy as np
import pytest

from longctx.data.stored_teacher import META, Plan, StoredTeacher, begin, part_name, write_part
from longctx.errors import UserError

PLAN = Plan(5, 4, 3, 1.0, 64, "m" * 64, {"data.seq_len": "4", "seed": "0"})


def rows(plan, seed=0):
    random = np.random.default_rng(seed)
    for _ in range(plan.rows):
        ids = random.integers(0, plan.vocab_size, (plan.seq_len, plan.top_k))
        yield ids, random.dirichlet(np.ones(plan.top_k + 1), plan.seq_len)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr("longctx.data.stored_teacher.PART_BYTES", 2 * PLAN.row_bytes + 1)


def write(path, plan=PLAN):
    every = list(rows(plan))
    for part in begin(path, plan):
        write_part(path, plan, part, iter([every[n] for n in plan.samples(part)]))
    return every


@pytest.mark.parametrize("vocab_size", [64, 1 << 16, (1 << 16) + 1])
def test_round_trip_in_parts(tmp_path, small_parts, vocab_size):
    plan = replace(PLAN, vocab_size=vocab_size)
    every = write(tmp_path / "t", plan)
    stored = StoredTeacher(tmp_path / "t")
    assert stored.plan == plan and plan.parts >= 3
    for n, (ids, probabilities) in enumerate(every):
        found, halves = stored.read(n)
        assert np.array_equal(found, ids) and halves.dtype == np.float16
        assert found.dtype == (np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        assert np.array_equal(halves, probabilities.astype(np.float16))
        row = stored.with_teacher({"tokens": np.zeros(4)}, n)
        assert row["teacher_ids"].dtype == np.int64 and row.keys() == {
            "tokens", "teacher_ids", "teacher_probabilities",
        }  # fmt: skip


def test_sizes_are_those_of_the_formula(tmp_path):
    write(tmp_path / "t")
    size = (tmp_path / "t" / part_name(0)).stat().st_size
    assert PLAN.row_bytes == 4 * (3 * 2 + 4 * 2)
    assert 0 < size - 5 * (PLAN.row_bytes + 4) < 400  # the header of safetensors
    paper = Plan(2_560_000, 2048, 50, 1.0, 32_000, "", {})
    assert paper.row_bytes == 2048 * 202
    assert paper.rows * paper.row_bytes == 1_059_061_760_000
    assert paper.parts * paper.part_rows >= paper.rows
    assert [len(paper.samples(p)) for p in (0, paper.parts - 1)] == [648, 400]


def test_only_missing_parts_are_asked_for(tmp_path, small_parts):
    write(tmp_path / "t")
    assert begin(tmp_path / "t", PLAN) == []
    (tmp_path / "t" / part_name(1)).unlink()
    assert begin(tmp_path / "t", PLAN) == [1]
    with pytest.raises(UserError, match="lacks 1 of 3 parts"):
        StoredTeacher(tmp_path / "t")


def test_a_part_that_fails_leaves_nothing(tmp_path, small_parts):
    begin(tmp_path / "t", PLAN)

    def broken():
        yield next(rows(PLAN))
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_part(tmp_path / "t", PLAN, 0, broken())
    assert [p.name for p in (tmp_path / "t").iterdir()] == [META]


def test_no_teacher_there(tmp_path):
    with pytest.raises(UserError, match="is no stored teacher"):
        StoredTeacher(tmp_path)
    (tmp_path / META).write_text(json.dumps({"format": 9}))
    with pytest.raises(UserError, match="not a stored teacher of format 1"):
        StoredTeacher(tmp_path)
    (tmp_path / META).write_text(json.dumps({"format": 1, "rows": 3}))
    with pytest.raises(UserError, match=r"no readable meta\.json"):
        StoredTeacher(tmp_path)
    (tmp_path / META).write_text("[]")
    with pytest.raises(UserError, match=r"no readable meta\.json"):
        StoredTeacher(tmp_path)


def damage_flip(path):
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(bytes(raw))


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def damage_header(path):
    path.write_bytes(b"\0" * 8 + path.read_bytes()[8:])


@pytest.mark.parametrize("damage", [damage_flip, damage_cut, damage_header])
def test_damage_is_one_line_and_can_be_mended(tmp_path, damage):
    every = write(tmp_path / "t")
    file = tmp_path / "t" / part_name(0)
    damage(file)
    stored = StoredTeacher(tmp_path / "t")
    with pytest.raises(UserError) as caught:
        for n in range(PLAN.rows):
            stored.read(n)
    text = str(caught.value)
    assert str(file) in text and "is damaged" in text and "remove it" in text and "\n" not in text
    file.unlink()
    write(tmp_path / "t")
    again = StoredTeacher(tmp_path / "t")
    assert all(np.array_equal(again.read(n)[0], every[n][0]) for n in range(PLAN.rows))
