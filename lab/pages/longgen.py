"""The LongGen sections of docs/results.md: the lab's table, the placement study, the speed table.

python lab/pages/longgen.py lab outputs/longgen        after lab/studies/longgen.sh
python lab/pages/longgen.py extend outputs/longgen_extend   after lab/studies/longgen_extend.sh
python lab/pages/longgen.py speed benchmarks/results   after benchmarks/longgen.py
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lab.pages.results import PROTOCOL, perplexities, replace  # noqa: E402
from lab.pages.training_free import depths, retrieval  # noqa: E402
from longctx.eval.figures import COLOURS, new_axes, save  # noqa: E402
from longctx.eval.results import read_results  # noqa: E402
from longctx.eval.tables import table  # noqa: E402
from longctx.train.log import read_metrics  # noqa: E402

METHODS = {
    "full": "full attention",
    "window": "**LongGen**, sinks and window",
    "blocks": "**LongGen**, strided blocks",
    "all_sparse": "every layer sparse",
    "sliding": "sliding window only",
}
PLACES = {  # name, where the full layers are, which they are
    "all_sparse": ("none", []),
    "first_1": ("first, 1 of 4", [0]),
    "middle_1": ("middle, 1 of 4", [1]),
    "last_1": ("last, 1 of 4", [3]),
    "first_2": ("first, 2 of 4", [0, 1]),
    "window": ("middle, 2 of 4 (hourglass)", [1, 2]),
    "last_2": ("last, 2 of 4", [2, 3]),
    "interleaved_2": ("interleaved, 2 of 4", [1, 3]),
    "full": ("all", None),
}
WITHIN = 1.02  # of full attention's perplexity


def lab(out: Path) -> str:
    """Perplexity, passkeys and the placement of the full layers."""
    found = collect(out)
    lengths = sorted(perplexities(found["full"]))
    whole = perplexities(found["full"])
    settings = found["full"]["tasks"]["perplexity"]["settings"]
    head = [*(f"ppl {n:,}" for n in lengths), "largest over full's"]
    head += [f"keys {n:,}" for n in lengths]

    def row(title: str, name: str) -> list[str]:
        ppl, keys = perplexities(found[name]), retrieval(found[name])
        worst = max(ppl[n] / whole[n] for n in lengths)
        cells = [f"{ppl[n]:.2f}" for n in lengths]
        return [title, *cells, f"{worst:.3f}", *(f"{keys[n]:.0%}" for n in lengths)]

    longest = lengths[-1]
    by_depth = [
        [title, *(f"{rate:.0%}" for _, rate in depths(found[name], longest))]
        for name, title in METHODS.items()
    ]
    at = [f"depth {depth:g}" for depth, _ in depths(found["full"], longest)]
    rows = [row(title, name) for name, title in METHODS.items()]
    places = [row(title, name) for name, (title, _) in PLACES.items()]
    figure(found, longest, ROOT / "docs" / "figures" / "longgen_placement.png")
    return "\n".join(
        [
            "",
            f"Perplexity by `{PROTOCOL}`, stride {settings['stride']}, the first "
            f"{settings['document_tokens']:,} tokens of each held-out document; keys: passkeys "
            "found, over five depths of ten prompts each.",
            "",
            *table(["attention", *head], rows),
            *verdicts(found, lengths),
            f"Passkeys found at {longest:,} by depth (0: at the beginning):",
            "",
            *table(["attention", *at], by_depth),
            "#### Where the full layers stand",
            "",
            "Sinks and window everywhere else. The lab model has four layers, hence quarters and "
            "halves; sixths and thirds would need another model.",
            "",
            *table(["full layers", *head], places),
            "![Passkeys found and perplexity by placement](figures/longgen_placement.png)",
            "",
            f"Made by `bash lab/studies/longgen.sh`, commit {found['full']['commit']}.",
            "",
        ]
    )


EXTENDED = {
    "full_2048": "full attention, rows of 2,048",
    "window_2048": "**LongGen**, rows of 2,048",
    "window_4096": "**LongGen**, rows of 4,096",
}


def extend(out: Path) -> str:
    """Window and pattern in one stage: perplexity by length."""
    measured = [n for n in EXTENDED if (out / f"{n}-eval" / "results.json").is_file()]
    found = {name: read_results(out / f"{name}-eval") for name in measured}
    lengths = sorted(perplexities(found["full_2048"]))
    rows = []
    for name, title in ((n, EXTENDED[n]) for n in measured):
        ppl, lines = perplexities(found[name]), read_metrics(out / name)
        rows.append([title, *(f"{ppl[n]:.2f}" for n in lengths), f"{lines[-1]['tokens']:,}",
                     f"{len(lines)}"])  # fmt: skip
    settings = found["full_2048"]["tasks"]["perplexity"]["settings"]
    head = [*(f"ppl {n:,}" for n in lengths), "tokens", "steps"]
    return "\n".join(
        [
            "",
            f"Perplexity by `{PROTOCOL}`, stride {settings['stride']}, the first "
            f"{settings['document_tokens']:,} tokens of each held-out document.",
            "",
            *table(["from the lab model, window 256", *head], rows),
            f"Made by `bash lab/studies/longgen_extend.sh`, commit {found['full_2048']['commit']}.",
            "",
        ]
    )


def collect(out: Path) -> dict[str, Any]:
    """What was measured, by name; points of the sweep by the layers that they record."""
    found: dict[str, Any] = {}
    for folder in sorted(out.glob("*-eval")):
        results = read_results(folder)
        own, name = results["attention"], folder.name.removesuffix("-eval")
        layers = own.get("full_layers")
        if own["name"] == "longgen_window" and own["sink_tokens"]:
            name = next(place for place, (_, full) in PLACES.items() if full == layers)
        found[name] = results
    return found


def verdicts(found: dict[str, Any], lengths: list[int]) -> list[str]:
    """The claims, met or missed."""
    whole = perplexities(found["full"])
    rows = []
    for name in ("window", "blocks"):
        ppl = perplexities(found[name])
        worst = max(ppl[n] / whole[n] for n in lengths)
        met = "met" if worst <= WITHIN else "**missed**"
        rows.append([f"{name}: perplexity over full's, at every length", f"{worst:.3f}",
                     f"<= {WITHIN}", met])  # fmt: skip
    for length in lengths[1:]:
        keys = {name: retrieval(result)[length] for name, result in found.items()}
        least = keys["full"] - 0.1
        for name, kept in (("window", True), ("blocks", True), ("all_sparse", False)):
            met = (keys[name] >= least) == kept
            rows.append(
                [
                    f"{name}: keys at {length:,}, full has {keys['full']:.0%}",
                    f"{keys[name]:.0%}",
                    f"{'at least' if kept else 'below'} full's less 10 points",
                    "met" if met else "**missed**",
                ]
            )
    return table(["claim", "measured", "target", ""], rows)


def figure(found: dict[str, Any], length: int, path: Path) -> None:
    """Passkeys found beside perplexity at the longest length, one bar pair a placement."""
    drawn, axes = new_axes(8.0, 3.8)
    names = list(PLACES)
    axes.bar(range(len(names)), [retrieval(found[n])[length] * 100 for n in names],
             color=COLOURS[0], width=0.6)  # fmt: skip
    axes.set_ylabel(f"passkeys found at {length:,}, %", color=COLOURS[0])
    axes.set_xticks(
        range(len(names)), [PLACES[n][0].replace(", ", "\n") for n in names], fontsize=8
    )
    other = axes.twinx()
    other.plot([perplexities(found[n])[length] for n in names], "D", color=COLOURS[1])
    other.set_ylabel(f"perplexity at {length:,}", color=COLOURS[1])
    save(drawn, path)
    path.with_suffix(".svg").unlink()  # Markdown shows the PNG


def speed(out: Path) -> str:
    """What benchmarks/longgen.py kept, a table for each device."""
    lines = [""]
    for file in sorted(out.glob("longgen_*.json")):
        kept = json.loads(file.read_text())
        rows, shapes = [], kept["shapes"]
        longest = max(shapes["lengths"])
        for row in kept["rows"]:
            if "skipped" in row:
                rows.append([row["work"], f"{row['length']:,}", row["skipped"], *[""] * 5])
                continue
            side, target = row["side"], shapes["targets"].get(row["work"])
            aim = (
                ""
                if target is None or row["length"] < longest
                else ("met" if row["ratio"] >= target else "**missed**") + f" (>= {target:g})"
            )
            saved = 1 - row["cache_bytes"][side] / row["cache_bytes"]["full"]
            equal = row["cache_bytes"] == row["formula_bytes"]
            rows.append([row["work"], f"{row['length']:,}", side,
                         f"{row['ratio']:.2f} ({row['ratios'][0]:.2f} to {row['ratios'][-1]:.2f})",
                         f"{row['bound']:.2f}", f"{row['of_bound']:.0%}", aim,
                         f"{saved:.1%}" + ("" if equal else " (formula differs)")])  # fmt: skip
        lines += [
            f"{kept['device']}, {kept['threads']} thread(s), torch {kept['torch']}: "
            f"{shapes['layers']} layers, a third of them full, {shapes['heads']} heads of "
            f"{shapes['dim']}, feed-forward {shapes['ffn']:,}, {shapes['dtype']}, "
            f"{shapes['kept']:,} tokens kept. Bound: FLOPs; for decoding, bytes.",
            "",
            *table(["work", "tokens", "attention", "times faster (all pairs)", "bound",
                    "of the bound", "target", "cache saved"], rows),
            f"Made by `python {kept['command']}`, commit {kept['commit']}.",
            "",
        ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    write = {"lab": lab, "extend": extend, "speed": speed}[sys.argv[1]]
    replace(ROOT / "docs" / "results.md", f"longgen_{sys.argv[1]}", write(Path(sys.argv[2])))
