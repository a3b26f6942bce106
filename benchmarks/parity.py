"""The parity certificate of every recipe, for docs/architecture.md.

python benchmarks/parity.py            all topologies of all recipes, about 15 minutes on two cores

What `python -m longctx.parity` prints for one recipe; of kinds of rows and accumulation the worst.
"""

import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import commit  # noqa: E402
from benchmarks.results_page import replace, table  # noqa: E402
from longctx import cli  # noqa: E402
from longctx.config import RunConfig  # noqa: E402
from longctx.parity.certificate import LIMIT, certify, failures, title  # noqa: E402
from longctx.parity.measure import Cell, Error  # noqa: E402

RUNS = (
    "recipe=pi model=llama2_7b",
    "recipe=pi model=llama2_7b rope=yarn adapter=lora",
    "recipe=longgen model=llama2_70b",
    "recipe=longgen model=llama2_7b attention=longgen_blocks",
    "recipe=dca_ft model=llama2_7b",
    "recipe=cepe_mlm model=llama2_7b",
    "recipe=cepe_warmup model=llama2_7b",
    "recipe=cepe model=llama2_7b",
    "recipe=ceped model=llama2_7b_chat",
    "recipe=chat_sft model=lab",
    "recipe=pretrain",
)
STAGES = (0, 1, 2, 3)


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


def main() -> None:
    """Measures all recipes and writes the table; ends with 1 if a cell is above the limit."""
    rows, wrong, cells = [], [], 0
    for arguments in RUNS:
        run = cli.compose(arguments.split(), RunConfig, "train", "run_schema")
        found = certify(run, short=False)
        wrong += [f"{arguments}: {line}" for line in failures(found)]
        cells += len(found)
        rows += rows_of(arguments, found)
        print("\n".join(" | ".join(row) for row in rows[-4:]), flush=True)
    verdict = "none" if not wrong else f"**{len(wrong)}**"
    text = [
        "",
        f"{cells:,} topologies, {verdict} above {LIMIT:g}. Largest relative error of the loss or "
        "of any parameter's gradient against one plain process, fp32; the worst of accumulation "
        "1 and 4 and of the kinds of rows that the recipe takes.",
        "",
        *table(["run, shrunk", "rows", "processes", *(f"ZeRO {z}" for z in STAGES)], rows),
        *(f"- {line}" for line in wrong),
        f"Made by `python benchmarks/parity.py`, commit {commit()}.",
        "",
    ]
    replace(ROOT / "docs" / "architecture.md", "parity", "\n".join(text))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
