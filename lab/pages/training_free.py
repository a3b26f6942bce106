"""The training-free sections of docs/results.md, from what the scripts in launch/ measured.

    python lab/pages/training_free.py outputs/training_free training_free
    python lab/pages/training_free.py outputs/beyond_8k beyond_8k
    python lab/pages/training_free.py outputs/dca_ft dca_ft

Beside each method stands the paper's row for the same multiples of the trained window: Llama-2-7B,
window 4,096, PG19 validation, stride 256 (Dual Chunk Attention, 2402.17463, table 1).
"""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lab.pages.results import PROTOCOL, perplexities, replace  # noqa: E402
from longctx.eval.results import read_results  # noqa: E402
from longctx.eval.tables import table  # noqa: E402

# Directory, name, and the paper's perplexities at 1, 2, 4 and 8 times the window.
METHODS = {
    "plain": ("plain RoPE", ("7.87", ">100", ">100", ">100")),
    "dynamic_ntk": ("dynamic NTK", ("7.87", "11.98", "26.12", "58.91")),
    "pi": ("PI, factor 8", None),
    "yarn": ("YaRN, factor 8", None),
    "streaming": ("StreamingLLM", None),
    "lm_infinite": ("LM-Infinite", None),
    "dca": ("**DCA**, preset paper", ("7.87", "7.67", "7.64", "7.89")),
    "dca_reference_code": ("DCA, preset reference_code", None),
    "dca_intra": ("ablation: intra", None),
    "dca_intra_inter": ("ablation: intra + inter", None),
}


def retrieval(results: dict[str, Any]) -> dict[int, float]:
    """Share of passkeys found, by length, over all depths."""
    cells = results["tasks"]["passkey"]["result"]["cells"]
    lengths = sorted({cell["length"] for cell in cells})
    rates = {n: [cell["rate"] for cell in cells if cell["length"] == n] for n in lengths}
    return {n: sum(found) / len(found) for n, found in rates.items()}


def depths(results: dict[str, Any], length: int) -> list[tuple[float, float]]:
    """(depth, share found) at one length."""
    cells = results["tasks"]["passkey"]["result"]["cells"]
    return [(cell["depth"], cell["rate"]) for cell in cells if cell["length"] == length]


def section(out: Path) -> str:
    """Perplexity and passkey by method and length, and passkey by depth."""
    found = {name: read_results(out / name) for name in METHODS if (out / name).is_dir()}
    lengths = sorted(perplexities(found["dca"]))
    rows = []
    for name, results in found.items():
        title, paper = METHODS[name]
        cells = [f"{perplexities(results)[n]:.1f}" for n in lengths]
        keys = [f"{retrieval(results)[n]:.0%}" for n in lengths]
        rows.append([title, *cells, *keys, " / ".join(paper) if paper else "-"])
    head = ["method", *(f"ppl {n:,}" for n in lengths), *(f"keys {n:,}" for n in lengths)]
    settings = found["dca"]["tasks"]["perplexity"]["settings"]
    lines = [
        "",
        f"Perplexity by `{PROTOCOL}`, stride {settings['stride']}, the first "
        f"{settings['document_tokens']:,} tokens of each held-out document; keys: passkeys found, "
        "over five depths of ten prompts each. Last column: the paper's perplexity of Llama-2-7B "
        "at the same multiples of its window of 4,096.",
        "",
        *table([*head, "paper, 1x / 2x / 4x / 8x"], rows),
    ]
    by_depth = [
        [METHODS[name][0], *(f"{rate:.0%}" for _, rate in depths(found[name], n))]
        for n in lengths[1:3]
        for name in ("plain", "dca", "dca_intra", "dca_intra_inter")
        if name in found
    ]
    shown = [f"{n:,}" for n in lengths[1:3] for _ in range(4)]
    named = [[n, *row] for n, row in zip(shown, by_depth, strict=False)]
    at = [f"depth {depth:g}" for depth, _ in depths(found["dca"], lengths[1])]
    lines += ["Passkeys found by depth (0: at the beginning):", ""]
    lines += table(["length", "method", *at], named)
    lines += [f"Made by `bash lab/studies/training_free.sh`, commit {found['dca']['commit']}.", ""]
    return "\n".join(lines)


def beyond(out: Path) -> str:
    """Perplexity by position of SmolLM2, past its window, and passkeys where they were asked."""
    found = {name: read_results(out / name) for name in METHODS if (out / name).is_dir()}
    rows, spans, protocol = [], [], {}
    for name, results in found.items():
        protocol = results["tasks"]["perplexity"]["result"]["protocols"]["single_pass_buckets"]
        buckets = [b for b in protocol["rows"][-1]["buckets"] if b["end"] > 1024]
        spans = [f"{b['start']:,} to {b['end']:,}" for b in buckets]
        title = METHODS[name][0].replace("factor 8", "factor 2")
        rows.append([title, *(f"{b['perplexity']:.2f}" for b in buckets)])
    first = next(iter(found.values()))
    asked = {name: r for name, r in found.items() if "passkey" in r["tasks"]}
    keys = []
    for name, results in asked.items():
        ((length, rate),) = retrieval(results).items()
        title = METHODS[name][0].replace("factor 8", "factor 2")
        keys.append(
            [title, f"{length:,}", f"{rate:.0%}", *(f"{r:.0%}" for _, r in depths(results, length))]
        )
    at = [f"depth {d:g}" for d, _ in depths(found["dca"], length)] if asked else []
    return "\n".join(
        [
            "",
            f"Perplexity by position, held-out texts: {protocol['documents']}, one pass over "
            f"{protocol['rows'][-1]['length']:,} tokens.",
            "",
            *table(["method", *spans], rows),
            "Passkeys found (0: at the beginning), one prompt a depth:",
            "",
            *table(["method", "tokens", "keys", *at], keys),
            f"Made by `bash lab/studies/beyond_8k.sh`, commit {first['commit']}.",
            "",
        ]
    )


def tuned(out: Path) -> str:
    """Dual Chunk Attention before and after fine-tuning under it."""
    found = {
        "no training": read_results(out.parent / "training_free" / "dca"),
        "`recipe=dca_ft`": read_results(out / "eval"),
    }
    after = found["`recipe=dca_ft`"]
    lengths = sorted(perplexities(after))
    rows = [
        [
            name,
            *(f"{perplexities(results)[n]:.2f}" for n in lengths),
            *(f"{retrieval(results)[n]:.0%}" for n in lengths),
            *(f"{rate:.0%}" for _, rate in depths(results, lengths[-1])),
        ]
        for name, results in found.items()
    ]
    head = [*(f"ppl {n:,}" for n in lengths), *(f"keys {n:,}" for n in lengths)]
    head += [f"keys {lengths[-1]:,}, depth {d:g}" for d, _ in depths(after, lengths[-1])]
    made = f"Made by `bash lab/studies/dca_ft.sh`, commit {after['commit']}."
    return "\n".join(["", *table(["Dual Chunk Attention", *head], rows), made, ""])


if __name__ == "__main__":
    write = {"training_free": section, "beyond_8k": beyond, "dca_ft": tuned}[sys.argv[2]]
    replace(ROOT / "docs" / "results.md", sys.argv[2], write(Path(sys.argv[1])))
