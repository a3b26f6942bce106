"""The section of docs/results.md on the plan's peak memory, from what was measured.

python lab/pages/plan.py benchmarks/results    after plan.py --write
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lab.pages.results import replace  # noqa: E402
from lab.pages.survival import made  # noqa: E402
from longctx.eval.tables import table  # noqa: E402

MIB = 2**20


def planning(kept: dict[str, Any]) -> list[str]:
    """Planned beside measured, a row a case."""
    rows = []
    for case in kept["cases"]:
        met = "met" if abs(case["ratio"] - 1) <= kept["target"] else "**missed**"
        what = f"ZeRO {case['zero']}" + "".join(f", `{one}`" for one in case["more"].split())
        size = [str(case["ranks"]), str(case["hidden"]), f"{case['tokens']:,}"]
        peaks = [f"{case[name] / MIB:.0f}" for name in ("planned", "measured")]
        rows.append([*size, what, *peaks, case["moment"], f"{case['ratio']:.3f}", met])
    low, high = 1 - kept["target"], 1 + kept["target"]
    head = ["processes", "hidden size", "tokens", "", "planned, MiB", "measured, MiB"]
    head += ["peak at", "planned over measured", f"target {low:.2f} to {high:.2f}"]
    return ["", *table(head, rows), made(kept), ""]


def main(out: Path) -> None:
    """Rewrites the section if its measurement is there."""
    file = out / "plan_cpu.json"
    if file.is_file():
        text = "\n".join(planning(json.loads(file.read_text())))
        replace(ROOT / "docs" / "results.md", "plan", text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
