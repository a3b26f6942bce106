"""The `deepspeed` launcher as users type it: starts, dies cleanly, leaves nothing behind."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.process import (
    alive,
    deepspeed,
    descendants,
    kill_tree,
    lines,
    start,
    torchrun,
    wait_until,
)
from tests.helpers.tiny import make_store, tiny_arguments


@pytest.mark.dist
def test_killed_at_start_then_started_again_then_terminated(tmp_path):
    shared_memory = set(Path("/dev/shm").iterdir())
    store = make_store(tmp_path / "store")
    run_dir = tmp_path / "run"
    arguments = tiny_arguments(store, run_dir, "train.max_steps=1000000")

    first = start(deepspeed(arguments), tmp_path / "first.log")
    wait_until(lambda: len(descendants(first.pid)) >= 4, 120, first)  # runner, launcher, two ranks
    time.sleep(3)  # somewhere in the imports or in the engine's start
    ours = descendants(first.pid)
    kill_tree(first)

    second = start(deepspeed(arguments), tmp_path / "second.log")
    try:
        wait_until(lambda: len(lines(run_dir / "metrics.jsonl")) >= 3, 180, second)
        below = descendants(second.pid)
        assert len(below) >= 4
        ours += below
        os.kill(second.pid, signal.SIGTERM)  # the command only, as a scheduler would
        wait_until(lambda: not alive(below[1:]), 30, None)
    finally:
        kill_tree(second)
    # Other tests may run beside this one: only what DeepSpeed names or our processes made counts.
    new = [p.name for p in set(Path("/dev/shm").iterdir()) - shared_memory]
    assert not [n for n in new if "deepspeed" in n or any(str(pid) in n for pid in ours)]


@pytest.mark.dist
def test_two_ranks_report_a_mistake_once(tmp_path):
    store = make_store(tmp_path / "store")
    arguments = tiny_arguments(store, tmp_path / "run", "train.batch_rows=3")
    process = start(torchrun(arguments), tmp_path / "log")
    assert process.wait(120)
    reported = [x for x in lines(tmp_path / "log") if x.startswith("error: ")]
    assert reported == [
        "error: train.batch_rows=3 is not a multiple of train.micro_batch_rows=1 x 2 ranks = 2"
    ]
