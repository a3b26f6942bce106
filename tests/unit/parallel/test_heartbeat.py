"""Whom the heartbeat gives up, on a clock of its own; with real processes see tests/dist."""

import time

import pytest
import torch

from longctx.parallel import heartbeat
from longctx.parallel.heartbeat import BEATS, Heartbeat
from longctx.parallel.mesh import Mesh

LIMIT = 30.0  # seconds
INTERVAL = LIMIT / BEATS


class Ended(Exception):  # noqa: N818 - it is no error
    """Instead of the end of the process."""


class Clock:
    """Time, and the event on which the threads wait: each look happens as the script says.

    Args:
        script: of (seconds that pass, what happens meanwhile).
    """

    def __init__(self, script) -> None:
        self.now, self.script = 100.0, iter(script)

    def monotonic(self) -> float:
        return self.now

    def wait(self, _: float) -> bool:
        passed, happens = next(self.script, (None, None))
        if passed is None:
            return True
        self.now += passed
        happens()
        return False


def look(monkeypatch, script, rank=0, ranks=3) -> str | None:
    """What the looking thread says while `script(beat)` runs; None if it gives nobody up.

    `beat(*ranks)` is an exchange with the store that finds one more beat of those.
    """
    watch = Heartbeat(Mesh(rank, ranks, torch.device("cpu")), LIMIT)
    watch._hosts = [f"host{n}" for n in range(ranks)]
    watch._beats = dict.fromkeys(range(1, ranks) if rank == 0 else [0], 0)

    def beat(*alive):
        watch._beats = {n: count + (n in alive) for n, count in watch._beats.items()}
        watch._exchanges += 1

    clock = Clock(script(beat))
    monkeypatch.setattr(heartbeat.time, "monotonic", clock.monotonic)
    monkeypatch.setattr(heartbeat.time, "sleep", lambda _: None)
    watch._over = clock

    def end(lost):
        raise Ended(lost)

    watch._end = end
    try:
        watch._look()
    except Ended as ended:
        return str(ended)
    finally:
        monkeypatch.undo()
    return None


def test_who_beats_is_not_lost_and_who_does_not_is_named(monkeypatch):
    def all_beat(beat):
        return [(INTERVAL, lambda: beat(1, 2))] * 50

    def one_does_not(beat):
        return all_beat(beat) + [(INTERVAL, lambda: beat(1))] * BEATS

    assert look(monkeypatch, all_beat) is None
    assert look(monkeypatch, one_does_not) is None  # just not long enough
    once_more = look(monkeypatch, lambda beat: one_does_not(beat) + one_does_not(beat)[-1:])
    assert once_more == "rank 2 on host2"


def test_a_store_that_does_not_answer_is_rank_0(monkeypatch):
    def silence(beat):
        return [(INTERVAL, lambda: beat(0))] * 5 + [(INTERVAL, lambda: None)] * (BEATS + 1)

    monkeypatch.setenv("MASTER_ADDR", "here")
    found = look(monkeypatch, silence, rank=1)
    assert found is not None and found.startswith("rank 0 on host0: the store of the ranks at here")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_job_that_was_stopped_as_a_whole_goes_on(monkeypatch, rank):
    def stopped_for_an_hour(beat):
        going = [(INTERVAL, lambda: beat(0, 1, 2))] * 5
        return [*going, (3600.0, lambda: None), (INTERVAL, lambda: None), *going]

    assert look(monkeypatch, stopped_for_an_hour, rank=rank) is None


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (RuntimeError("Connection closed by peer"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ValueError("a mistake of one's own"), False),
        (None, False),
    ],
)
def test_only_what_a_lost_rank_may_have_caused_waits_for_its_name(error, waits):
    watch = Heartbeat(Mesh(0, 2, torch.device("cpu")), 0.5)
    begin = time.monotonic()
    watch.__exit__(type(error), error, None)
    assert (time.monotonic() - begin > 0.5) == waits
    assert watch._over.is_set()
