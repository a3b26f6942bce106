"""A run that is asked to stop (SIGUSR1, SIGUSR2, SIGTERM) finishes its step, saves, exits with 75.

The signal may reach one rank only, or reach two ranks before and after the end of a step; so the
ranks compare after each step whether any of them was asked. Costs one summed number a step.
"""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not finished, the same command goes on
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)  # submitit sends the second


class Stopped(Exception):  # noqa: N818 - it is no error
    """The run was asked to stop, and has saved.

    Args:
        path: the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(f"asked to stop: saved {path}; the same command goes on from there")
        self.path = path


class Asked:
    """Records SIGNALS while it is open, instead of ending the process.

    A handler that was installed before (by a scheduler's library that requeues the job) is called
    when this closes, if its signal came. After `Stopped` the process ignores the signals: a
    launcher that sees one rank exit sends SIGTERM to the others, which are exiting too. Outside the
    main thread no signal is recorded.
    """

    def __init__(self) -> None:
        self._heard: list[int] = []
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __bool__(self) -> bool:
        return bool(self._heard)

    def __enter__(self) -> "Asked":
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._hear) for n in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if kind is Stopped else handler)
        for number in self._heard:
            handler = self._before[number]
            if callable(handler):
                handler(number, None)

    def _hear(self, number: int, _: FrameType | None) -> None:
        if number not in self._heard:
            self._heard.append(number)
