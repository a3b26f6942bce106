"""The sections of docs/results.md on saving and on two processes, from what was measured.

python lab/pages/survival.py benchmarks/results    after saving.py, scaling.py and
                                                         sequence_parallel.py --write
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lab.pages.results import replace  # noqa: E402
from longctx.eval.tables import table  # noqa: E402

WAYS = {"waiting": "the run waits", "beside": "beside the run (`train.save_async`)"}


def made(kept: dict[str, Any]) -> str:
    """How it was measured."""
    return f"Made by `python {kept['command']}`, {kept['device']}, commit {kept['commit']}."


def spread(values: list[float], form: str = ".3f") -> str:
    """The smallest and the largest."""
    return f"({values[0]:{form}} to {values[-1]:{form}})"


def saving(kept: dict[str, Any]) -> list[str]:
    """What a checkpoint costs the steps, and how large and how soon back it is."""
    rows = []
    for how, title in WAYS.items():
        median = kept["median_of_ratios"][how]
        met = "met" if median <= kept["target"] else "**missed**"
        aim = [f"<= {kept['target']:g}", met] if how == "beside" else ["", ""]
        seconds = f"{kept['seconds_per_step'][how]:.3f}"
        rows.append([title, f"{median:.3f} {spread(kept['ratios'][how])}", seconds, *aim])
    head = [f"a checkpoint every {kept['every']} steps", "step time over none (all)", "s", "", ""]
    sizes = [
        [
            {"cepe": "`recipe=cepe`: encoder and cross-attention", "full": "all weights"}[part],
            f"{size['parameters']:,}",
            f"{size['bytes'] / 1e6:.1f} MB",
            f"{size['save_seconds']:.2f} s",
            f"{size['resume_seconds']:.2f} s",
        ]
        for part, size in kept["sizes"].items()
    ]
    return [
        "",
        *table(head, rows),
        *table(["checkpoint of", "parameters", "size", "written in", "resumed in"], sizes),
        made(kept),
        "",
    ]


def scaling(kept: dict[str, Any]) -> list[str]:
    """Two processes beside one."""
    median = kept["median_of_ratios"]
    row = [
        f"{median:.2f} {spread(kept['ratios'], '.2f')}",
        f">= {kept['target']:g}",
        "met" if median >= kept["target"] else "**missed**",
        f"{kept['median_communication_share']:.1%} {spread(kept['communication_shares'], '.1%')}",
    ]
    head = ["tokens/s of two processes over one", "target", "", "communication and waiting"]
    return ["", *table(head, [row]), f"ZeRO {kept['stage']}. {made(kept)}", ""]


def sequence_parallel(kept: dict[str, Any]) -> list[str]:
    """What a rank holds with two of them at a row."""
    met = "met" if kept["memory_ratio"] >= kept["target"] else "**missed**"
    one, two = kept["found"]["1"], kept["found"]["2"]
    head = ["row", "one process", "a rank of `parallel.sp=2`", "times less", "target", "",
            "seconds of a step, one / two"]  # fmt: skip
    row = [f"{kept['length']:,}", f"{one['bytes'] / 1e6:,.0f} MB", f"{two['bytes'] / 1e6:,.0f} MB",
           f"{kept['memory_ratio']:.2f}", f">= {kept['target']:g}", met,
           f"{one['seconds']:.1f} / {two['seconds']:.1f}"]  # fmt: skip
    return ["", *table(head, [row]), made(kept), ""]


SECTIONS = {"saving": saving, "scaling": scaling, "sequence_parallel": sequence_parallel}


def main(out: Path) -> None:
    """Rewrites the sections whose measurements are there."""
    for name, write in SECTIONS.items():
        file = out / f"{name}_cpu.json"
        if file.is_file():
            text = "\n".join(write(json.loads(file.read_text())))
            replace(ROOT / "docs" / "results.md", name, text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
