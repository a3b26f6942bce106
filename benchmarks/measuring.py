"""What the benchmarks share: seconds of a call, peak memory, and where it was measured."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call: this process's CPU seconds, or a GPU's seconds on the wall."""
    if device.type == "cpu":
        begin = time.process_time()
        call()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def growth(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes by which memory peaks during one call above what is held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return int(torch.cuda.max_memory_allocated() - before)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """Bytes of a field of this process's /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024


def apart(script: str, *arguments: object) -> int:
    """The number that `script --peak ...` prints, in a process that hands back what it frees."""
    command = [sys.executable, script, "--peak", *map(str, arguments)]
    returned = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc keeps nothing freed
    done = subprocess.run(command, env=returned, capture_output=True, text=True, check=True)
    return int(done.stdout)


def commit() -> str:
    """The commit of the source tree, `+` where it is changed."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def keep(name: str, device: torch.device, facts: dict[str, Any]) -> None:
    """Writes benchmarks/results/NAME_DEVICE.json: the facts, and how they were measured."""
    gpu = device.type == "cuda"
    described = torch.cuda.get_device_name(device) if gpu else platform.processor()
    whole = {
        **facts,
        "device": described or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "command": " ".join(sys.argv),
        "commit": commit(),
    }
    target = ROOT / "benchmarks" / "results" / f"{name}_{device.type}.json"
    target.write_text(json.dumps(whole, indent=1) + "\n")
