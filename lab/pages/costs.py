"""The table of docs/extend-a-model.md: what each method costs, as `longctx plan` prints it.

python lab/pages/costs.py    a minute; no GPU and no weights
"""

import contextlib
import io
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lab.pages.results import replace  # noqa: E402
from longctx.eval.tables import table  # noqa: E402
from longctx.plan import __main__ as plan  # noqa: E402

MARK = "costs"
# What is wanted, the method, what the run leaves, and the run; a plan of eight GPUs each.
ROWS = (
    ("8K, cheaply", "`recipe=pi`", "a stock checkpoint",
     "recipe=pi model=llama2_7b gpus=8 parallel=zero2"),
    ("32K", "`recipe=pi_32k`", "a stock checkpoint",
     "recipe=pi_32k model=llama2_7b gpus=8 parallel=zero3 parallel.sp=4"),
    ("128K", "`recipe=pi rope=yarn`, 400 steps", "a stock checkpoint",
     "recipe=pi rope=yarn model=llama2_7b seq_len=131072 train.max_steps=400 gpus=8 "
     "parallel=zero3 parallel.sp=8"),
    ("128K with a small cache", "`recipe=longgen`", "a checkpoint with longctx's attention",
     "recipe=longgen model=llama2_7b seq_len=131072 gpus=8 parallel.mlp_tile=4096"),
    ("better DCA", "`recipe=dca_ft`", "a checkpoint with longctx's attention",
     "recipe=dca_ft model=llama2_7b gpus=8 parallel=zero3"),
    ("many documents, decoder unchanged", "`recipe=cepe` after its warm-ups",
     "decoder, encoder and cross-attention", "recipe=cepe model=llama2_7b gpus=8 parallel=zero2"),
)  # fmt: skip


def cost(arguments: str) -> str:
    """Tokens and time of a run, from the lines that `longctx plan` prints."""
    said = io.StringIO()
    sys.argv = ["longctx plan", *arguments.split()]
    with contextlib.redirect_stdout(said):
        plan.main()
    tokens = re.search(r"steps = ([\d.]+B) tokens", said.getvalue())
    time = re.search(r"steps in ([\d.,]+ \w+)$", said.getvalue(), re.MULTILINE)
    fits = re.search(r"^FITS: ([\d.]+) of", said.getvalue(), re.MULTILINE)
    assert tokens and time and fits, said.getvalue()
    return f"{tokens[1]}, {time[1]}; {fits[1]} GiB"


def section() -> str:
    """The table, and the commands behind it."""
    none = ["a longer window, no training", "`attention=dca` ([page](no-training.md))", "none"]
    rows = [[*none, "your checkpoint, read with longctx"]]
    rows += [[want, method, cost(run), result] for want, method, result, run in ROWS]
    head = ["I want", "method", "tokens, time; peak memory of a GPU", "the result is"]
    commands = [f"longctx plan {run}" for *_, run in ROWS]
    return "\n".join(
        [
            "",
            *table(head, rows),
            "The commands behind the table:",
            "",
            "```sh",
            *commands,
            "```",
            "",
        ]
    )


if __name__ == "__main__":
    replace(ROOT / "docs" / "extend-a-model.md", MARK, section())
