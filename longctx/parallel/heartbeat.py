"""Ends all ranks within a minute when one is lost or frozen, and names it.

Without it they wait in a collective for hours. Each rank has two threads and one connection of its
own to the rendezvous store (MASTER_ADDR:MASTER_PORT): one thread increments its own counter there
and reads those of others, the second watches in case the store does not answer. Rank 0 watches all
ranks and says which one is lost; the others watch rank 0. A busy rank still beats: compiling,
loading, saving, evaluating or waiting in a collective do not count as silence. A main thread that
hangs alone is not noticed. Costs the steps nothing: a few small messages every few seconds.
"""

import os
import socket
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist

from longctx.parallel.mesh import Mesh

EXIT_CODE = 76  # EX_PROTOCOL of sysexits.h: the other side broke the connection
BEATS = 10  # within `lost_after`
SUSPICIOUS = 3  # beats missed that are enough once a collective has failed
SAID = 1  # intervals without a verdict after which the error is printed
LOST = "lost"  # key of 1 + the rank that rank 0 reports as lost


class Heartbeat:
    """Ends this process with EXIT_CODE when another rank is lost, for as long as it is open.

    A collective that fails because a rank is gone raises in the main thread before `lost_after` has
    passed; then leaving the context waits for the verdict, so that the last line names the rank.

    Args:
        mesh: the ranks; a single one is not watched.
        lost_after: seconds of silence after which a rank counts as lost; 0: never.
    """

    def __init__(self, mesh: Mesh, lost_after: float) -> None:
        self._rank, self._ranks, self._limit = mesh.rank, mesh.ranks, lost_after
        self._interval = lost_after / BEATS
        self._hosts: list[str] = [""] * mesh.ranks
        self._beats: dict[int, int] = {}  # of the ranks that this one hears
        self._exchanges = 0
        self._verdict = 0
        self._over = threading.Event()

    def __enter__(self) -> "Heartbeat":
        if self._ranks > 1 and self._limit:
            dist.all_gather_object(self._hosts, socket.gethostname())
            for work in (self._beat, self._look):
                threading.Thread(target=work, name="heartbeat", daemon=True).start()
        else:
            self._over.set()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        own = isinstance(error, torch.OutOfMemoryError)  # not because of another rank
        if isinstance(error, RuntimeError) and not own and not self._over.is_set():
            patience = self._limit + SUSPICIOUS * self._interval
            self._limit = SUSPICIOUS * self._interval
            if not self._over.wait(SAID * self._interval):
                first = str(error).strip().partition("\n")[0]
                sys.stderr.write(
                    f"{type(error).__name__}: {first}\nlooking for {patience:.0f} seconds whether "
                    "a rank is lost; else the traceback follows\n"
                )
                sys.stderr.flush()
                self._over.wait(patience)
        self._over.set()

    def _beat(self) -> None:
        """Exchanges beats with the store. May hang in it; then `_look` sees no exchange."""
        store = None
        heard = range(1, self._ranks) if self._rank == 0 else range(1)
        while not self._over.wait(self._interval):
            try:
                store = store or self._connect()
                store.add(str(self._rank), 1)
                self._beats = {rank: store.add(str(rank), 0) for rank in heard}
                if self._verdict:  # of this rank, which is rank 0
                    store.add(LOST, self._verdict)
                    self._verdict = 0
                elif self._rank and (lost := store.add(LOST, 0)):
                    self._end(self._named(lost - 1))
                self._exchanges += 1
            except RuntimeError:  # no answer: the next time over a new connection
                store = None

    def _connect(self) -> dist.PrefixStore:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=self._interval)
        store = dist.TCPStore(address, port, is_master=False, timeout=patience)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps its store
        return dist.PrefixStore(f"longctx/heartbeat/{attempt}", store)

    def _look(self) -> None:
        """Measures how long the store and, while it answers, the ranks have been silent.

        A late look counts for two intervals at most: while this process was frozen itself, it
        could not observe others.
        """
        silent: dict[int, float] = {}
        unanswered, exchanges, beats, last = 0.0, 0, self._beats, time.monotonic()
        while not self._over.wait(self._interval):
            now = time.monotonic()
            passed, last = min(now - last, 2 * self._interval), now
            if self._exchanges == exchanges:
                unanswered += passed
            else:
                exchanges, unanswered = self._exchanges, 0.0
                seen, before = self._beats, beats
                beats = seen
                for rank, count in seen.items():
                    still = before.get(rank) == count
                    silent[rank] = silent.get(rank, 0.0) + passed if still else 0.0
            if unanswered > self._limit:
                where = os.environ["MASTER_ADDR"]
                self._end(f"{self._named(0)}: the store of the ranks at {where} does not answer")
            for rank, seconds in silent.items():
                if seconds > self._limit:
                    self._give_up(rank)

    def _give_up(self, rank: int) -> None:
        """Ends this process; rank 0 first gives the others time to read its verdict."""
        if self._rank == 0:
            self._verdict = rank + 1
            time.sleep(SUSPICIOUS * self._interval)
        self._end(self._named(rank))

    def _named(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"

    def _end(self, lost: str) -> None:
        if self._rank in (0, 1) or os.environ.get("LOCAL_RANK") == "0":
            line = f"error: {lost} is lost: no sign of life for {self._limit:g} seconds; "
            sys.stderr.write(line + "all ranks end\n")
            sys.stderr.flush()
        os._exit(EXIT_CODE)
