"""Writes checkpoints while the run waits, or in the background; says what happens if one fails.

In the background (`train.save_async`): each rank copies its share to host memory at the end of a
step, and a thread writes it. After each later step the ranks learn how many have finished, by a sum
that they compute anyway; once all have, rank 0 renames the checkpoint to its final name. One is
being written at a time. Costs the copy, and host memory for it: 12 bytes per trained parameter,
divided by the ranks.
"""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from longctx.config import TrainConfig
from longctx.parallel.mesh import Mesh, first_to
from longctx.train.checkpoint import writer
from longctx.train.checkpoint.writer import SaveError
from longctx.train.log import say

State = Iterator[tuple[str, dict[str, Tensor]]]


class Saver:
    """Writes a run's checkpoints, and drops those beyond `keep_last`.

    Args:
        root: the run's `checkpoints` directory.
        config: `save_async` and `keep_last`.
        mesh: the ranks.
        resumed: the checkpoint that the run resumes from.
    """

    def __init__(self, root: Path, config: TrainConfig, mesh: Mesh, resumed: Path | None) -> None:
        self.root, self.config, self.mesh = root, config, mesh
        self.last: Path | None = None  # the last complete one of this directory
        if resumed and (root / resumed.name).resolve() == resumed.resolve():
            self.last = root / resumed.name
        self._written: _Writing | None = None  # shares are being written
        self._named: _Writing | None = None  # written by all, being renamed

    def save(self, step: int, state: State, about: dict[str, Any]) -> None:
        """Writes a checkpoint, or starts to. A failure is a warning: the run has older ones.

        Collective, like the other methods.

        Args:
            step: optimizer steps taken.
            state: `Engine.state()`.
            about: see `writer.save`.
        """
        self.finish()
        if self.config.save_async:
            mine = writer.share(state, self.mesh, copy=True)
            self._written = _Writing(self.root, step, mine, about, self.mesh)
            return
        try:
            self.save_and_wait(step, state, about)
        except SaveError as error:
            self._warn(str(error))

    def save_and_wait(self, step: int, state: State, about: dict[str, Any]) -> None:
        """Writes a checkpoint.

        Raises:
            SaveError: if a rank cannot write; older checkpoints are as they were.
        """
        self.last = writer.save(self.root, step, state, about, self.mesh)
        if self.mesh.main:
            writer.prune(self.root, step, self.config.keep_last)

    def news(self) -> tuple[bool, bool]:
        """Whether this rank has finished writing its share, and whether that failed."""
        if self._written is None or self._written.task.is_alive():
            return False, False
        return True, self._written.task.failure is not None

    def hear(self, done: float, failed: float) -> None:
        """Renames the pending checkpoint once all ranks have written it, at the end of a step.

        Args:
            done: ranks that have finished.
            failed: of them, those that could not write.
        """
        if self._written is None or done < self.mesh.ranks:
            return
        if failed:
            self.finish()
            return
        self._name()

    def finish(self) -> None:
        """Waits for a pending checkpoint and updates `last`; a failure is a warning."""
        try:
            if self._written is not None:
                self._written.agree()
                self._name()
            if self._named is not None:
                self._named.agree()
                self.last = writer.place(self.root, self._named.step)
        except SaveError as error:
            self._warn(str(error))
        self._written = self._named = None

    def _name(self) -> None:
        self._named, self._written = self._written, None
        if self.mesh.main and self._named is not None:
            self._named.publish(self.config.keep_last)

    def _warn(self, line: str) -> None:
        knows = not line.endswith(writer.OTHERS)
        if (self.mesh.main or knows) and first_to(f"warn {line}"):
            say(f"warning: {line}; the run goes on")


class _Task(threading.Thread):
    """One call in a thread of its own, while the run goes on.

    Args:
        work: what to call; it may fail to write.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.failure: str | None = None
        self._work: Callable[[], object] | None = work
        self.start()

    def run(self) -> None:
        """Calls it, keeps the reason of a failure, and frees what it held."""
        work, self._work = self._work, None
        if work is None:
            return
        try:
            self.failure = writer.failure_of(work)
        except BaseException as error:
            self.failure = f"{type(error).__name__}: {error}"  # unfinished is no success
            raise  # with its traceback, by the thread


class _Writing:
    """A pending checkpoint on this rank: its share is written, then the whole is renamed."""

    def __init__(
        self, root: Path, step: int, mine: dict[str, Tensor], about: dict[str, Any], mesh: Mesh
    ) -> None:
        self.step = step
        self._root, self._about, self._mesh = root, {"step": step, **about}, mesh
        self._partial = writer.place(root, step).with_suffix(".tmp")
        partial = self._partial
        self.task = _Task(lambda: writer.write_share(partial, mine, mesh))

    def publish(self, keep_last: int) -> None:
        """Starts renaming it, and dropping checkpoints beyond `keep_last`; on rank 0."""

        def name() -> None:
            writer.publish(self._partial, self._about, self._mesh.ranks)
            writer.prune(self._root, self.step, keep_last)

        self.task = _Task(name)

    def agree(self) -> None:
        """Waits until all ranks have finished their part; raises SaveError if one failed."""
        self.task.join()
        writer.all_or_none(self._partial, self.task.failure, self._mesh)
