"""The thread that is ahead: same results, bounded, errors where they belong, and it ends."""

import threading
import time

import pytest

from longctx.data.loader import Prefetch


class Slow:
    """Notes which steps it was asked for, and by which thread."""

    def __init__(self, fails=(), seconds=0.0):
        self.fails = set(fails)
        self.seconds = seconds
        self.asked = []
        self.threads = set()

    def step(self, step, dp_rank, dp_size):
        self.asked.append(step)
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds)
        if step in self.fails:
            raise KeyError(step)
        return [(step, dp_rank, dp_size)]


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def settle(check):
    until = time.monotonic() + 10
    while not check():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_results_are_the_loaders_own_in_any_order(ahead):
    ready = Prefetch(Slow(), ahead, end=100)
    for step in [0, 1, 2, 3, 50, 51, 49, 3, 99]:
        assert ready.step(step, 1, 2) == [(step, 1, 2)]
    assert ready.step(3, 0, 4) == [(3, 0, 4)]  # other ranks, other rows
    ready.close()
    assert threads() == []


def test_it_stays_as_far_ahead_as_it_was_told():
    loader = Slow()
    ready = Prefetch(loader, 2, end=100)
    ready.step(10, 0, 1)
    settle(lambda: len(loader.asked) == 3)
    time.sleep(0.05)
    assert loader.asked == [10, 11, 12]
    assert len(threads()) == 1 and loader.threads == {threads()[0].name}
    ready.step(11, 0, 1)
    settle(lambda: loader.asked == [10, 11, 12, 13])
    ready.close()


def test_each_step_is_read_once_and_none_beyond_the_end():
    loader = Slow()
    ready = Prefetch(loader, 3, end=6)
    for step in range(6):
        ready.step(step, 0, 1)
    ready.close()
    assert loader.asked == list(range(6))
    assert ready.step(6, 0, 1) == [(6, 0, 1)]  # asked for all the same: it comes
    ready.close()


def test_it_works_while_the_caller_does():
    loader = Slow(seconds=0.05)
    ready = Prefetch(loader, 1, end=100)
    ready.step(0, 0, 1)
    time.sleep(0.2)
    begin = time.perf_counter()
    ready.step(1, 0, 1)
    assert time.perf_counter() - begin < 0.04
    ready.close()


def test_an_error_comes_at_its_own_step_and_not_before():
    ready = Prefetch(Slow(fails=[2]), 3, end=10)
    assert ready.step(0, 0, 1) and ready.step(1, 0, 1)
    with pytest.raises(KeyError, match="2"):
        ready.step(2, 0, 1)
    assert ready.step(3, 0, 1) == [(3, 0, 1)]
    ready.close()


def test_closing_drops_what_was_not_begun():
    loader = Slow(seconds=0.05)
    ready = Prefetch(loader, 50, end=100)
    ready.step(0, 0, 1)
    begin = time.perf_counter()
    ready.close()
    ready.close()
    assert time.perf_counter() - begin < 1
    assert len(loader.asked) <= 3 and threads() == []


def test_steps_that_were_jumped_over_are_not_read():
    loader = Slow(seconds=0.05)
    ready = Prefetch(loader, 10, end=100)
    ready.step(0, 0, 1)
    ready.step(50, 0, 1)
    assert loader.asked in ([0, 50], [0, 1, 50], [0, 1, 50, 51], [0, 50, 51])
    ready.close()


def test_no_thread_when_nothing_is_to_be_ahead():
    loader = Slow()
    Prefetch(loader, 0, end=10).step(4, 0, 1)
    assert loader.asked == [4] and loader.threads == {threading.current_thread().name}
