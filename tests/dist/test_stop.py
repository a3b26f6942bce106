"""SIGUSR1 and SIGTERM: all ranks finish the same step, save it, and the command says so."""

import os
import signal

import pytest

from longctx.train.signals import EXIT_CODE
from tests.helpers.process import kill_tree, lines, ranks, start, torchrun, wait_until
from tests.helpers.tiny import make_store, tiny_arguments

STEPS = 1_000_000


@pytest.mark.dist
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_one_rank_stops_both_at_one_step(number, tmp_path):
    store, run_dir = make_store(tmp_path / "store"), tmp_path / "run"
    process = start(
        torchrun(tiny_arguments(store, run_dir, f"train.max_steps={STEPS}")), tmp_path / "log"
    )
    try:
        wait_until(lambda: len(lines(run_dir / "metrics.jsonl")) >= 3, 120, process)
        os.kill(ranks(process.pid)[1], number)
        assert process.wait(60) == 1  # torchrun's own word for any failure
    finally:
        kill_tree(process)
    done = len(lines(run_dir / "metrics.jsonl"))
    saved = run_dir / "checkpoints" / f"step_{done:08d}"
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    log = (tmp_path / "log").read_text()
    assert f"asked to stop: saved {saved}; the same command goes on from there" in log
    assert log.count(f"exitcode  : {EXIT_CODE}") == 2  # torchrun's list of ranks
    assert not (run_dir / "hf").exists()
