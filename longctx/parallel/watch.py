"""No orphan ranks: a rank ends when the launcher that started it is gone.

A SIGTERM to the `deepspeed` command ends only that command; its per-node launcher and the ranks
would train on for ever. Each rank therefore looks once a second whether its line of ancestors still
stands. Linux only (/proc); elsewhere nothing is watched.
"""

import os
import signal
import threading
import time
from pathlib import Path


def _parent(pid: int) -> int:
    """Parent of `pid`; 0 if there is no such process."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(status.rsplit(")", 1)[1].split()[1])


def _ancestors() -> list[int]:
    """The launcher's processes above this one, nearest first."""
    launcher = os.getppid()
    try:
        command = Path(f"/proc/{launcher}/cmdline").read_bytes()
    except OSError:
        return []
    line = [launcher]
    if b"deepspeed.launcher.launch" in command:  # itself started by the `deepspeed` command
        line.append(_parent(launcher))
    return line


def end_with_launcher(interval: float = 1.0) -> None:
    """Starts the watch, if a launcher started this process.

    Args:
        interval: seconds between looks.
    """
    if "RANK" not in os.environ:
        return
    line = _ancestors()

    def look() -> None:
        while line:
            time.sleep(interval)
            chain, pid = [], os.getpid()
            for _ in line:
                pid = _parent(pid)
                chain.append(pid)
            if chain != line:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    threading.Thread(target=look, name="launcher-watch", daemon=True).start()
