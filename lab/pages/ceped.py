"""The CEPED section of docs/results.md.

python lab/pages/ceped.py outputs/ceped       after lab/studies/ceped.sh
"""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lab.pages.cepe import curve  # noqa: E402
from lab.pages.results import replace  # noqa: E402
from longctx.eval.results import read_results  # noqa: E402
from longctx.eval.tables import table  # noqa: E402

MODELS = {
    "alone": "the chat model alone",
    "warmup": "after the warm-up",
    "ce_only": "main stage, next-token loss alone",
    "full": "**CEPED**, `kl.mode=full`",
    "topk_rest": "CEPED, `kl.mode=topk_rest`",
    "topk_drop": "CEPED, `kl.mode=topk_drop`",
}
KINDS = ("all", "key", "repeat", "list")


def cells(results: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """Replies by kind of instruction and number of contexts."""
    result = results["tasks"]["template"]["result"]
    return {(c["kind"], c["count"]): c for c in result["cells"]}


def percent(cell: dict[str, Any], key: str) -> str:
    """A rate with its 95% interval."""
    low, high = cell[f"{key}_interval"]
    return f"{100 * cell[key]:.0f} ({100 * low:.0f} to {100 * high:.0f})"


def lab(out: Path) -> str:
    """Instructions followed, and perplexity behind contexts, model by model."""
    found = {n: read_results(out / f"{n}-eval") for n in MODELS if (out / f"{n}-eval").is_dir()}
    first = found["alone"]
    replies = cells(first)
    numbers = sorted({count for _, count in replies})
    asked = replies["all", numbers[0]]["prompts"]
    lengths = sorted(curve(first, "own"))
    followed, right, read = [], [], []
    for name, results in found.items():
        own, title = cells(results), MODELS[name]
        followed.append([title, *(percent(own["all", n], "follows") for n in numbers)])
        right.append([title, *(percent(own[k, n], "right") for n in numbers for k in KINDS[1:])])
        losses = [curve(results, kind)[n]["perplexity"] for kind in ("own", "other")
                  for n in lengths[kind == "other" :]]  # fmt: skip
        read.append([title, *(f"{x:.2f}" for x in losses)])
    protocol = first["tasks"]["contexts"]["result"]["protocols"]["cepe_tail_matched"]
    heads = [*(f"right before it, n = {n}" for n in lengths),
             *(f"other document, n = {n}" for n in lengths[1:])]  # fmt: skip
    return "\n".join(
        [
            "",
            f"Held-out instructions answered in the template to the letter, per cent of {asked} "
            "(95% Wilson interval), alone and behind contexts of held-out text, of which one holds "
            "the passage that is asked for. The chat model alone reads contexts in its own window, "
            "the others through the encoder.",
            "",
            *table(["model", *(f"{n} contexts" for n in numbers)], followed),
            f"Of each kind, the share that is also right ({asked // 3} of each):",
            "",
            *table(["model", *(f"{k}, {n} contexts" for n in numbers for k in KINDS[1:])], right),
            f"Perplexity of the last {protocol['target_tokens']} of {protocol['decoder_tokens']} "
            f"decoder tokens behind n contexts of {protocol['size']} tokens:",
            "",
            *table(["model", *heads], read),
            f"Made by `bash lab/studies/ceped.sh`, commit {found['full']['commit']}.",
            "",
        ]
    )


if __name__ == "__main__":
    replace(ROOT / "docs" / "results.md", "ceped_lab", lab(Path(sys.argv[1])))
