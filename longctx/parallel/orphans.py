"""No orphan ranks: a rank ends when the launcher that started it is gone.

A SIGTERM to the `deepspeed` command ends only that command; its per-node launcher and the ranks
would train on for ever; and a sweep that is killed cannot end its jobs. Each rank therefore checks
once a second whether its ancestors still run. Linux only (/proc); elsewhere nothing is watched.
"""

import os
import signal
import threading
import time
from pathlib import Path

DRIVER = "LONGCTX_DRIVER"  # process id of the sweep that started this job, if one did
GRACE = 120.0  # seconds a rank without a launcher has to save its step


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
    driver = int(os.environ.get(DRIVER, launcher))
    while driver not in line and line[-1] > 1:
        line.append(_parent(line[-1]))
    return line


def end_with_launcher(interval: float = 1.0) -> None:
    """Starts the watch, if a launcher started this process.

    Args:
        interval: seconds between looks.
    """
    if not {"RANK", DRIVER} & os.environ.keys():
        return
    line = _ancestors()
    late = bool(line) and int(os.environ.get(DRIVER, line[0])) not in line  # the sweep is gone

    def look() -> None:
        while line:
            time.sleep(interval)
            chain, pid = [], os.getpid()
            for _ in line:
                pid = _parent(pid)
                chain.append(pid)
            if late or chain != line:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(GRACE)  # the end of the step, or stuck with ranks that are gone
                os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=look, name="launcher-watch", daemon=True).start()
