"""One claim about data with what was measured, and the JSON that keeps it."""

import json
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def ratio(
    claim: str, values: list[float], sign: str, target: float, facts: dict[str, Any]
) -> dict[str, Any]:
    """One claim with what was measured."""
    median = statistics.median(values)
    print(f"{claim}: {median:.3g} (target {sign} {target:g})")
    return {
        "claim": claim, "target": target, "sign": sign, "median": median,
        "values": sorted(values), "facts": facts,
    }  # fmt: skip


def keep(part: str, claims: list[dict[str, Any]]) -> None:
    """Writes benchmarks/results/data_PART_cpu.json."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {
        "claims": claims, "command": f"python benchmarks/data.py {part} --write",
        "commit": commit, "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }  # fmt: skip
    target = ROOT / "benchmarks" / "results" / f"data_{part}_cpu.json"
    target.write_text(json.dumps(facts, indent=1) + "\n")
