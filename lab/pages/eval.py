"""The section of docs/results.md on what evaluating costs, from benchmarks/eval.py --write.

python lab/pages/eval.py benchmarks/results
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


def section(kept: dict[str, Any]) -> str:
    """Teacher-forced passkeys against generation, and memory by vocabulary."""
    rows = []
    for each in kept["passkey"]:
        least, most = each["least_and_most"]
        met = "met" if each["times_faster"] >= kept["target"] else "**missed**"
        rows.append(
            [
                f"{each['length']}",
                f"{each['times_faster']:.1f} ({least:.1f} to {most:.1f})",
                met if each["same_answers"] else "**other answers**",
                f"{each['times_faster_than_batched']:.1f}",
                f"{each['correct']} of {each['samples']}",
                "the same" if each["same_answers"] else "**not the same**",
            ]
        )
    aim = f">= {kept['target']:g}"
    head = ["prompt, tokens", "times faster than generating (all)", aim, "than in batches"]
    memory = kept["perplexity"]
    peaks = [
        [f"{int(v):,}", f"{held / MIB:.0f} MiB", f"{memory['all_logits_bytes'][v] / MIB:,.0f} MiB"]
        for v, held in memory["peak_bytes"].items()
    ]
    return "\n".join(
        [
            "",
            *table([*head, "keys found", "answers"], rows),
            f"Growth of memory while {memory['tokens']:,} tokens are scored:",
            "",
            *table(["vocabulary", "peak", "all logits would take"], peaks),
            made(kept),
            "",
        ]
    )


def main(out: Path) -> None:
    """Rewrites the section."""
    kept = json.loads((out / "eval_cpu.json").read_text())
    replace(ROOT / "docs" / "results.md", "eval_speed", section(kept))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
