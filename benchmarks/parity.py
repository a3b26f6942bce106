"""The parity certificate of every recipe, for docs/architecture.md.

python benchmarks/parity.py            all topologies of all recipes, about 20 minutes on two cores

What `python -m longctx.parity` prints for one recipe; of kinds of rows and accumulation the worst.
Each recipe is kept under benchmarks/results as it is done, with the commit it was measured at; the
same command measures what is missing. Delete that file to begin again.
"""

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import commit  # noqa: E402
from lab.pages.results import replace, table  # noqa: E402
from longctx import cli  # noqa: E402
from longctx.config import RunConfig  # noqa: E402
from longctx.parity.certificate import LIMIT, certify, failures, title  # noqa: E402
from longctx.parity.measure import Cell, Error  # noqa: E402

RUNS = (
    "recipe=pi model=llama2_7b",
    "recipe=pi model=llama2_7b rope=yarn adapter=lora",
    "recipe=longgen model=llama2_70b",
    "recipe=cepe model=llama2_7b",
    "recipe=ceped model=llama2_7b_chat",
    "recipe=dca_ft model=llama2_7b",
    "recipe=longgen model=llama2_7b attention=longgen_blocks",
    "recipe=cepe_warmup model=llama2_7b",
    "recipe=cepe_mlm model=llama2_7b",
    "recipe=chat_sft model=lab",
    "recipe=pretrain",
)
STAGES = (0, 1, 2, 3)
KEPT = ROOT / "benchmarks" / "results" / "parity_cpu.json"


def rows_of(arguments: str, found: list[tuple[Cell, Error]]) -> list[list[str]]:
    """A row for each way to spread the processes, a column for each stage."""
    rows = []
    for name, group in groupby(sorted(found, key=lambda x: (x[0].world, x[0].sp)),
                               key=lambda x: title(x[0])):  # fmt: skip
        own = list(group)
        worst = {z: max(max(e.loss, e.gradient) for c, e in own if c.zero == z) for z in STAGES}
        kinds = ", ".join(dict.fromkeys(c.kind for c, _ in own))
        rows.append([f"`{arguments}`", kinds, name, *(f"{worst[z]:.1e}" for z in STAGES)])
    return rows


def page(kept: dict[str, Any]) -> str:
    """What is measured so far, as a section."""
    rows = [row for done in kept.values() for row in done["rows"]]
    wrong = [line for done in kept.values() for line in done["wrong"]]
    cells = sum(done["cells"] for done in kept.values())
    missing = [arguments for arguments in RUNS if arguments not in kept]
    lines = [
        "",
        f"{cells:,} topologies, {f'**{len(wrong)}**' if wrong else 'none'} above {LIMIT:g}. "
        "Largest relative error of the loss or of any parameter's gradient against one plain "
        "process, fp32; the worst of accumulation 1 and 4 and of the kinds of rows that the "
        "recipe takes.",
        "",
        *table(["run, shrunk", "rows", "processes", *(f"ZeRO {z}" for z in STAGES)], rows),
        *(f"- {line}" for line in wrong),
    ]
    if missing:
        lines.append(f"Not yet measured: {', '.join(f'`{x}`' for x in missing)}.")
    commits = ", ".join(dict.fromkeys(done["commit"] for done in kept.values()))
    return "\n".join([*lines, f"Made by `python benchmarks/parity.py`, commit {commits}.", ""])


def main() -> None:
    """Measures what is missing and writes the table; ends with 1 if a cell is above the limit."""
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for arguments in RUNS:
        if arguments not in kept:
            run = cli.compose(arguments.split(), RunConfig, "train", "run_schema")
            found = certify(run, short=False)
            wrong = [f"{arguments}: {line}" for line in failures(found)]
            kept[arguments] = {"rows": rows_of(arguments, found), "wrong": wrong,
                               "cells": len(found), "commit": commit()}  # fmt: skip
            KEPT.write_text(json.dumps(kept, indent=1) + "\n")
        print("\n".join(" | ".join(row) for row in kept[arguments]["rows"]), flush=True)
        replace(ROOT / "docs" / "architecture.md", "parity", page(kept))
    sys.exit(any(done["wrong"] for done in kept.values()))


if __name__ == "__main__":
    main()
