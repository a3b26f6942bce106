"""The CEPE sections of docs/results.md.

python lab/pages/cepe.py lab outputs/cepe              after lab/studies/cepe.sh
python lab/pages/cepe.py speed benchmarks/results      after benchmarks/cepe.py
"""

import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lab.pages.results import replace  # noqa: E402
from longctx.eval.figures import COLOURS, MARKERS, new_axes, save  # noqa: E402
from longctx.eval.results import read_results  # noqa: E402
from longctx.eval.tables import table  # noqa: E402
from longctx.train.log import read_metrics  # noqa: E402

MODELS = {
    "alone": "the decoder alone, contexts in front",
    "warmup": "after the warm-up",
    "main": "**CEPE**",
}
KINDS = {"own": "right before it", "other": "of another document"}
STAGES = ("cepe_mlm", "cepe_warmup_short", "cepe_warmup", "cepe")


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the token-matched protocol."""
    found: list[dict[str, Any]] = results["tasks"]["contexts"]["result"]["protocols"][
        "cepe_tail_matched"
    ]["rows"]
    return found


def curve(results: dict[str, Any], kind: str) -> dict[int, dict[str, Any]]:
    """Rows by number of contexts; none is where both kinds begin."""
    return {r["count"]: r for r in rows_of(results) if r["context"] in ("none", kind)}


def lab(out: Path) -> str:
    """Loss with true, other and no context, what it shows, and the stages."""
    found = {name: read_results(out / name) for name in MODELS}
    own = found["main"]["tasks"]["contexts"]["result"]["protocols"]["cepe_tail_matched"]
    counts = sorted(curve(found["main"], "own"))
    body = []
    for name, title in MODELS.items():
        for kind, words in KINDS.items():
            cells = curve(found[name], kind)
            body.append([title, words, *(f"{cells[n]['perplexity']:.2f}" for n in counts)])
    figure(found, ROOT / "docs" / "figures" / "cepe_contexts.png")
    return "\n".join(
        [
            "",
            f"Perplexity of the last {own['target_tokens']} of {own['decoder_tokens']} decoder "
            f"tokens behind n contexts of {own['size']} tokens, the same tokens in every column "
            f"(`cepe_tail_matched`, {rows_of(found['main'])[0]['tokens']:,} tokens of "
            f"{own['documents']} held-out documents).",
            "",
            *table(["model", "context", *(f"n = {n}" for n in counts)], body),
            *verdicts(found["main"], counts),
            "![Perplexity behind contexts](figures/cepe_contexts.png)",
            "",
            *stages(out),
            f"Made by `bash lab/studies/cepe.sh`, commit {found['main']['commit']}.",
            "",
        ]
    )


def verdicts(main: dict[str, Any], counts: list[int]) -> list[str]:
    """The claims, met or missed, from losses on the same tokens."""
    true, other = curve(main, "own"), curve(main, "other")
    falls = [true[b]["nll"] < true[a]["nll"] for a, b in pairwise(counts)]
    rows = [
        [
            "loss falls from each number of contexts to the next (as numbers, errors aside)",
            ", ".join(f"{true[n]['nll']:.3f}" for n in counts),
            "met" if all(falls) else "**missed**",
        ]
    ]
    for n in counts[1:]:
        none = true[0]["nll"]
        met = [true[n]["nll"] < other[n]["nll"], true[n]["nll"] < none, other[n]["nll"] < none]
        rows.append(
            [
                f"n = {n}: true < other document, true < none, other < none",
                f"{true[n]['nll']:.3f}, {other[n]['nll']:.3f}, {none:.3f} "
                f"(true gains {true[n]['gain']:.3f} +- {true[n]['gain_se']:.3f})",
                ", ".join("met" if each else "**missed**" for each in met),
            ]
        )
    return table(["claim", "nats a token", ""], rows)


def stages(out: Path) -> list[str]:
    """What the three trainings did: held-out loss at their beginning and end."""
    rows = []
    for name in STAGES:
        lines = read_metrics(out / name)
        held = [(m["step"], m["eval_loss"]) for m in lines if m.get("eval_loss")]
        (first, before), (last, after) = held[0], held[-1]
        seconds = sum(m["seconds"] for m in lines)
        rows.append(
            [f"`{name}`", f"{last:,}", f"{lines[-1]['tokens']:,}", f"{before:.3f} (step {first})",
             f"{after:.3f}", f"{math.exp(after):.1f}", f"{seconds:,.0f}"]
        )  # fmt: skip
    head = ["stage", "steps", "tokens", "held-out loss, first", "last", "perplexity", "seconds"]
    return table(head, rows)


def figure(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Perplexity against the number of contexts."""
    drawn, axes = new_axes(7.0, 4.0)
    for i, (name, kind) in enumerate(("main", k) for k in KINDS):
        cells = curve(found[name], kind)
        axes.plot(
            range(len(cells)),
            [cells[n]["perplexity"] for n in sorted(cells)],
            marker=MARKERS[i],
            color=COLOURS[i],
            label=f"{MODELS[name].strip('*')}, context {KINDS[kind]}",
        )
    counts = sorted(curve(found["main"], "own"))
    axes.set_xticks(range(len(counts)), [str(n) for n in counts])
    axes.set_xlabel("contexts in the encoder")
    axes.set_ylabel("perplexity")
    axes.legend(fontsize=8)
    save(drawn, path)
    path.with_suffix(".svg").unlink()  # Markdown shows the PNG


def speed(out: Path) -> str:
    """What benchmarks/cepe.py kept, a table for each device."""
    lines = [""]
    for file in sorted(out.glob("cepe_*.json")):
        kept = json.loads(file.read_text())
        rows = [
            [
                row["work"],
                f"{row['tokens']:,}",
                f"{row['ratio']:.2f} ({row['ratios'][0]:.2f} to {row['ratios'][-1]:.2f})",
                f"{row['bound']:.2f}",
                f"{row['of_bound']:.0%}",
                "" if row.get("memory_ratio") is None else f"1/{row['memory_ratio']:.2f}",
            ]
            for row in kept["rows"]
        ]
        lines += [
            f"{kept['device']}, {kept['threads']} thread(s), torch {kept['torch']}: "
            f"{kept['about']}",
            "",
            *table(["work", "context tokens", "times faster (all pairs)", "bound", "of the bound",
                    "memory"], rows),
            f"Made by `python {kept['command']}`, commit {kept['commit']}.",
            "",
        ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    write = {"lab": lab, "speed": speed}[sys.argv[1]]
    replace(ROOT / "docs" / "results.md", f"cepe_{sys.argv[1]}", write(Path(sys.argv[2])))
