"""What a process does with SIGUSR1, SIGUSR2 and SIGTERM while it trains, and after."""

import os
import signal
import threading
from pathlib import Path

import pytest

from longctx.train.signals import SIGNALS, Asked, Stopped


@pytest.fixture(autouse=True)
def as_before():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_ends_nothing(number):
    heard = []
    signal.signal(number, lambda number, frame: heard.append(number))
    with Asked() as asked:
        assert not asked
        for _ in range(2):
            os.kill(os.getpid(), number)
        assert asked and heard == []
    assert heard == [number]


def test_who_listened_before_hears_it_once_the_step_is_saved():
    heard = []
    signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    with pytest.raises(Stopped), Asked():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == []
        raise Stopped(Path("step_00000003"))
    assert heard == [signal.SIGUSR1]


def test_a_run_that_ends_by_itself_leaves_signals_as_they_were():
    def listener(number, frame):
        raise AssertionError

    for number in SIGNALS:
        signal.signal(number, listener)
    with Asked() as asked:
        assert not asked
    assert [signal.getsignal(number) for number in SIGNALS] == [listener] * len(SIGNALS)


def test_after_stopping_a_second_signal_is_not_heard():
    with pytest.raises(Stopped), Asked():
        raise Stopped(Path("step_00000003"))
    for number in SIGNALS:
        os.kill(os.getpid(), number)  # a launcher that saw another rank leave
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_IGN] * len(SIGNALS)


def test_a_thread_hears_nothing_and_breaks_nothing():
    def enter():
        with Asked() as asked:
            found.append(bool(asked))

    found, before = [], [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [False]
    assert [signal.getsignal(number) for number in SIGNALS] == before
