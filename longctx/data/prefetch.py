"""The next steps' batches, prepared in the background while a step computes.

One thread, at most `ahead` steps beyond the one that was asked for, so as many batches in memory.
The results are the loader's own; what it raises is raised at the step that it belongs to.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from longctx.batch import Batch

Place = tuple[int, int, int]  # step, dp_rank, dp_size


class Steps(Protocol):
    """What is asked of a loader."""

    def step(self, step: int, dp_rank: int, dp_size: int) -> list[Batch]:
        """A rank's micro-batches of a step."""
        ...


class Prefetch:
    """A loader that is ahead of its caller. Steps may be asked for in any order; rising is fast.

    Args:
        loader: where the batches come from.
        ahead: steps prepared in advance; 0: none, and no thread.
        end: the first step that will not be asked for.
    """

    def __init__(self, loader: Steps, ahead: int, end: int) -> None:
        self.loader = loader
        self.ahead = ahead
        self.end = end
        self._thread: ThreadPoolExecutor | None = None
        self._ready: dict[Place, Future[list[Batch]]] = {}

    def step(self, step: int, dp_rank: int, dp_size: int) -> list[Batch]:
        """The loader's `step`, waiting for what is not ready."""
        if not self.ahead:
            return self.loader.step(step, dp_rank, dp_size)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        last = min(step + self.ahead, self.end - 1)
        wanted = [(n, dp_rank, dp_size) for n in range(step, max(last, step) + 1)]
        for place in self._ready.keys() - set(wanted):
            self._ready.pop(place).cancel()
        for place in wanted:
            if place not in self._ready:
                self._ready[place] = self._thread.submit(self.loader.step, *place)
        return self._ready.pop(wanted[0]).result()

    def close(self) -> None:
        """Ends the thread; what is under way is waited for. A later `step` starts a new one."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread = None
        self._ready.clear()
