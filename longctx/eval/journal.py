"""The finished work of a task, kept piece by piece and shared by several processes.

A task cuts its work into pieces and has each of them done through `Journal.each`:

    batches = list(prompts_in_batches)
    answers = subject.journal.each("needle", batches, ask, size=len)     # one outcome a piece

`ask(batch)` returns anything JSON can hold (tuples come back as lists); `answers` is in the order
of the pieces and complete on every rank. A piece is what one forward pass takes (a batch, or one
prompt to generate from): results then depend neither on the number of ranks nor on where a run was
killed. Pieces must come out the same, in the same order, whenever the task is run; `each` may be
called several times, with other titles. What follows (means, intervals) is computed on every
rank, so a task needs to know nothing of ranks. It shows a progress bar; do not open another.

Costs one written line a piece. A finished line is never done again; a torn last one is.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Sized
from pathlib import Path
from typing import IO, Any, TypeVar

from tqdm import tqdm

Piece = TypeVar("Piece")
Key = tuple[str, int]  # title, number of the piece


def one(_: Any) -> int:
    """The size of a piece that counts as one."""
    return 1


class Journal:
    """The finished pieces of the task at hand; without a folder they are kept nowhere.

    Args:
        folder: where the lines are written; all ranks must see it.
        rank: of this process.
        ranks: how many processes share the work.
        barrier: waits for all of them; None: there is one.
        writes: whether this one writes down what it does; another does the same and writes.
    """

    def __init__(
        self,
        folder: Path | None = None,
        rank: int = 0,
        ranks: int = 1,
        barrier: Callable[[], None] | None = None,
        writes: bool = True,
    ) -> None:
        assert folder is not None or barrier is None, "ranks meet in a folder"
        self.writes = writes
        self.folder, self.rank, self.ranks, self.barrier = folder, rank, ranks, barrier
        self._name = ""
        self._done: dict[Key, Any] = {}
        self._titles: set[str] = set()
        self._file: IO[bytes] | None = None

    @property
    def first(self) -> bool:
        """Whether this rank writes files and talks."""
        return self.rank == 0 and self.writes

    def begin(self, name: str) -> None:
        """Takes up a task where it was left.

        Args:
            name: of the task and of everything that its numbers depend on.
        """
        self._close()
        self._name, self._titles = name, set()
        self._done = self._read()
        self._wait()  # nobody writes before all have read

    def end(self) -> None:
        """The task's result is written: its journal goes."""
        self._close()
        self._wait()
        if self.first:
            for path in self._paths():
                path.unlink()
            if self.folder is not None and self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()

    def each(
        self,
        title: str,
        pieces: Iterable[Piece],
        do: Callable[[Piece], Any],
        *,
        total: int | None = None,
        unit: str = "prompt",
        size: Callable[[Piece], int] = one,
        alone: bool = False,
    ) -> list[Any]:
        """Does what is not done yet; this rank its share of it.

        Args:
            title: of the progress bar, and of these pieces in the journal: one use a task.
            pieces: the work, in a fixed order; built lazily if it is an iterator.
            do: what to do with one; JSON must be able to hold what it returns.
            total: sum of the sizes. None: counted, if the pieces have a length.
            unit: what `size` counts, for the bar.
            size: of a piece.
            alone: the first rank does all of it (a measurement that company would disturb).

        Returns:
            One outcome a piece, in their order, on every rank.
        """
        assert title not in self._titles, f"{title} is in the journal already"
        self._titles.add(title)
        if total is None and isinstance(pieces, Sized) and not isinstance(pieces, str):
            total = sum(size(piece) for piece in pieces)
        bar = _Bar(title, unit, total, self.first)
        count = 0
        for index, piece in enumerate(pieces):
            count += 1
            if (title, index) in self._done:
                bar.kept(size(piece))
                continue
            if self.rank == (0 if alone else index % self.ranks):
                self._keep((title, index), do(piece))
            bar.update(size(piece))
        self._meet()
        bar.close()
        return [self._done.pop((title, index)) for index in range(count)]

    def _keep(self, key: Key, outcome: Any) -> None:
        line = json.dumps([*key, outcome])
        self._done[key] = json.loads(line)[2]  # as it will be read back
        if self.folder is None or not self.writes:
            return
        if self._file is None:
            self._file = self._open(self.folder / f"{self._name}.{self.rank}.jsonl")
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def _open(self, path: Path) -> IO[bytes]:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
        file = path.open("ab")
        if torn:
            file.write(b"\n")  # ends a line that a kill cut short, so that the next one is whole
        return file

    def _meet(self) -> None:
        """Every rank learns what the others did."""
        if self.barrier is not None:
            self._close()
            self._wait()
            self._done |= self._read()

    def _wait(self) -> None:
        if self.barrier is not None:
            self.barrier()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _paths(self) -> list[Path]:
        if self.folder is None:
            return []
        return sorted(self.folder.glob(f"{self._name}.*.jsonl"))

    def _read(self) -> dict[Key, Any]:
        found: dict[Key, Any] = {}
        for path in self._paths():
            for line in path.read_bytes().splitlines():
                try:
                    title, index, outcome = json.loads(line)
                except ValueError:  # torn
                    continue
                found[title, index] = outcome
        return found


class _Bar:
    """Progress with the time left on a terminal, one line at the end elsewhere; first rank only."""

    def __init__(self, title: str, unit: str, total: int | None, shown: bool) -> None:
        self.title, self.unit, self.shown = title, unit, shown
        self.begin, self.done, self.before = time.perf_counter(), 0, 0
        self.terminal = shown and sys.stderr.isatty()
        off = not self.terminal
        self.bar = tqdm(total=total, desc=title, unit=unit, smoothing=0.0, disable=off)

    def kept(self, size: int) -> None:
        """So much was done before: it counts, but says nothing of the speed."""
        self.before += size
        if self.terminal:
            self.bar.initial += size
            self.bar.update(size)

    def update(self, size: int) -> None:
        """So much was done, here or (at the same pace, one assumes) on another rank."""
        self.done += size
        self.bar.update(size)

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()
        if self.shown and not self.terminal:
            seconds = time.perf_counter() - self.begin
            kept = f", {self.before} kept from before" if self.before else ""
            line = f"{self.title}: {self.done} x {self.unit} in {seconds:.1f} s{kept}"
            tqdm.write(line, file=sys.stderr)
