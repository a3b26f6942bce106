"""Saving beside the run: what is on the disk when, and the same bytes as when the run waits."""

import threading
from types import SimpleNamespace

import pytest
import torch

from longctx.train.checkpoint import background, reader, writer
from longctx.train.checkpoint.background import Saver
from longctx.train.checkpoint.writer import SaveError
from tests.unit.train.checkpoint.test_writer import ABOUT, Alone, damage, names, state

MESH = Alone(0, 1, torch.device("cpu"))


def settings(beside=True, keep_last=0):
    return SimpleNamespace(save_async=beside, keep_last=keep_last)


@pytest.fixture
def disk(monkeypatch):
    """An event without which nothing is written."""
    ready, write = threading.Event(), writer.write_share

    def slowly(*arguments):
        assert ready.wait(20)
        write(*arguments)

    monkeypatch.setattr(writer, "write_share", slowly)
    yield ready
    ready.set()


def full(*_):
    raise OSError(28, "No space left on device")


def wait_for(writes):
    writes._written.task.join()


def test_it_gets_its_name_when_all_have_written_and_heard(tmp_path, disk):
    writes = Saver(tmp_path, settings(), MESH, None)
    assert writes.news() == (False, False)
    writes.save(3, state(3), ABOUT)
    assert writes.news() == (False, False) and names(tmp_path) == []
    disk.set()
    wait_for(writes)
    assert writes.news() == (True, False) and names(tmp_path) == ["step_00000003.tmp"]
    writes.hear(0, 0)  # another rank has not
    assert writes.news() == (True, False) and writes.last is None
    writes.hear(1, 0)
    writes.finish()
    assert names(tmp_path) == ["step_00000003"] and writes.last == tmp_path / "step_00000003"
    assert reader.open_checkpoint(writes.last).step == 3


def test_the_same_files_as_when_the_run_waits(tmp_path):
    for name, beside in (("beside", True), ("waiting", False)):
        writes = Saver(tmp_path / name, settings(beside), MESH, None)
        writes.save(4, state(4), ABOUT)
        writes.finish()
    a, b = (
        {p.name: p.read_bytes() for p in (tmp_path / name / "step_00000004").iterdir()}
        for name in ("beside", "waiting")
    )
    assert a == b and len(a) == 2


def test_what_the_next_step_changes_is_not_written(tmp_path, disk):
    kept = {name: {k: v.clone() for k, v in values.items()} for name, values in state(5)}
    weights = dict(state(5))
    writes = Saver(tmp_path, settings(), MESH, None)
    writes.save(5, iter(weights.items()), ABOUT)
    for values in weights.values():
        for value in values.values():
            value.zero_()
    disk.set()
    writes.finish()
    for name, values in reader.open_checkpoint(tmp_path / "step_00000005").state():
        assert all(torch.equal(values[kind], kept[name][kind]) for kind in values)


def test_the_next_save_waits_for_the_one_under_way(tmp_path):
    writes = Saver(tmp_path, settings(keep_last=2), MESH, None)
    for step in (1, 2, 3, 4):
        writes.save(step, state(step), ABOUT)
        assert not (tmp_path / f"step_{step:08d}").exists()
        assert step == 1 or (tmp_path / f"step_{step - 1:08d}").exists()
    writes.finish()
    assert names(tmp_path) == ["step_00000003", "step_00000004"]


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("fails", ["save_file", "_write_json"])
def test_a_failure_is_a_warning_and_the_older_one_stays(
    beside, fails, tmp_path, monkeypatch, capsys
):
    writes = Saver(tmp_path, settings(beside, keep_last=1), MESH, None)
    writes.save(1, state(1), ABOUT)
    writes.finish()
    with monkeypatch.context() as broken:
        broken.setattr(writer, fails, full)
        writes.save(2, state(2), ABOUT)
        writes.finish()
        assert names(tmp_path) == ["step_00000001"] and writes.last == tmp_path / "step_00000001"
        warnings = [x for x in capsys.readouterr().err.splitlines() if "warning: " in x]
        assert len(warnings) == 1
        assert "step_00000002 could not be written: [Errno 28] No space left" in warnings[0]
        with pytest.raises(SaveError, match="step_00000002 could not be written"):
            writes.save_and_wait(2, state(2), ABOUT)
        assert names(tmp_path) == ["step_00000001"]
    writes.save_and_wait(3, state(3), ABOUT)
    assert names(tmp_path) == ["step_00000003"]


def test_a_rank_that_could_not_says_why_and_rank_0_that_one_could_not(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(writer, "save_file", full)
    second = Alone(1, 2, torch.device("cpu"))
    Saver(tmp_path, settings(beside=False), second, None).save(2, state(2), ABOUT)
    assert "step_00000002 could not be written: [Errno 28]" in capsys.readouterr().err
    line = f"{tmp_path}/step_00000003 could not be written: {writer.OTHERS}"
    for rank, said in ((0, 1), (1, 0)):
        Saver(tmp_path, settings(), Alone(rank, 2, torch.device("cpu")), None)._warn(line)
        assert capsys.readouterr().err.count("another rank failed; the run goes on") == said


def test_heard_of_a_failure_it_is_dropped_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writer, "_write_json", full)
    writes = Saver(tmp_path, settings(), MESH, None)
    writes.save(2, state(2), ABOUT)
    wait_for(writes)
    assert writes.news() == (True, True)
    writes.hear(1, 1)
    assert names(tmp_path) == [] and "could not be written" in capsys.readouterr().err
    assert writes.news() == (False, False)


def test_numbers_that_are_not_finite_are_not_saved(tmp_path, capsys):
    spoilt = dict(state(1))
    spoilt["c.bias"]["exp_avg"][1] = float("nan")
    writes = Saver(tmp_path, settings(beside=False), MESH, None)
    writes.save(1, iter(spoilt.items()), ABOUT)
    assert "step_00000001 could not be written: c.bias/exp_avg is not finite" in (
        capsys.readouterr().err
    )
    assert names(tmp_path) == []


def test_the_checkpoint_it_goes_on_from_is_the_last_if_it_is_its_own(tmp_path):
    own = writer.save(tmp_path / "own", 5, state(5), ABOUT, MESH)
    assert Saver(tmp_path / "own", settings(), MESH, own).last == own
    assert Saver(tmp_path / "new", settings(), MESH, own).last is None
    damage(own)
    assert background.Saver(tmp_path / "own", settings(), MESH, None).last is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_of_our_own_beside_the_run_is_no_success(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise KeyError("weight")

    monkeypatch.setattr(writer, "write_share", broken)
    writes = Saver(tmp_path, settings(), MESH, None)
    writes.save(2, state(2), ABOUT)
    wait_for(writes)
    assert writes.news() == (True, True)
    writes.finish()
    assert names(tmp_path) == [] and writes.last is None
    assert "step_00000002 could not be written: KeyError: 'weight'" in capsys.readouterr().err
