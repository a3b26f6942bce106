"""A rank that is killed or stopped ends the others, by name; a busy or waiting one ends nobody."""

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch.multiprocessing

from longctx.parallel import mesh
from longctx.parallel.heartbeat import EXIT_CODE, Heartbeat
from tests.helpers.spawn import _entry, free_port, without_gpus

LOST_AFTER = 2.0  # seconds
AT_MOST = 2.0 * LOST_AFTER + 4.0  # until all have ended, on a busy machine


def on_rank(out: Path, lost: int, number: int | None) -> None:
    """Beats for a while under difficulties; then one rank gets a signal and the others wait."""
    ranks = mesh.start()
    error = os.open(out / f"err-{ranks.rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(error, 2)
    with Heartbeat(ranks, LOST_AFTER):
        if ranks.rank == 1:
            time.sleep(1.5 * LOST_AFTER)  # the others wait for it in a collective
        ranks.barrier()
        (out / f"waited-{ranks.rank}").touch()
        if number is None:
            return
        if ranks.rank == lost:
            (out / "signalled").write_text(str(time.time()))
            os.kill(os.getpid(), number)
        # The first is as NCCL, whose wait no closed connection ends; the second is gloo.
        threading.Event().wait(60) if lost == 1 else ranks.barrier()


def start(world: int, *args) -> list:
    context, port = torch.multiprocessing.get_context("spawn"), free_port()
    started = []
    for rank in range(world):
        process = context.Process(target=_entry, args=(rank, on_rank, world, port, args))
        with without_gpus():
            process.start()
        started.append(process)
    return started


@pytest.mark.dist
def test_lost_ranks(tmp_path):
    cases = {
        "stop-2": (2, signal.SIGSTOP),
        "stop-0": (0, signal.SIGSTOP),  # which keeps the store
        "kill-1": (1, signal.SIGKILL),
        "kill-0": (0, signal.SIGKILL),
    }
    for name, (lost, number) in cases.items():
        out = tmp_path / name
        out.mkdir()
        started = start(3, out, lost, number)
        others = [process for rank, process in enumerate(started) if rank != lost]
        try:
            for process in others:
                process.join(90)
            took = time.time() - float((out / "signalled").read_text())
        finally:
            for process in started:
                process.kill()
                process.join()
        assert took < AT_MOST, (name, took)
        text = {rank: (out / f"err-{rank}").read_text() for rank in range(3)}
        assert [p.exitcode for p in others] == [EXIT_CODE] * 2, (name, text)
        speaker = 1 if lost == 0 else 0
        said = [x for x in text[speaker].splitlines() if x.startswith("error: ")]
        assert len(said) == 1 and said[0].startswith(
            f"error: rank {lost} on {socket.gethostname()}"
        )
        assert all((out / f"waited-{rank}").exists() for rank in range(3))


@pytest.mark.dist
def test_a_run_that_ends_is_no_loss(tmp_path):
    started = start(2, tmp_path, 0, None)
    for process in started:
        process.join(90)
    assert [process.exitcode for process in started] == [0, 0]
    assert [(tmp_path / f"err-{rank}").read_text().count("error") for rank in (0, 1)] == [0, 0]
