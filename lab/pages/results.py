"""Writes the tables of docs/results.md and README.md from what the scripts in launch/ measured.

python lab/pages/results.py lab outputs/lab        after lab/studies/pi.sh
python lab/pages/results.py demo outputs/demo      after make demo
python lab/pages/results.py gguf outputs/gguf      after lab/studies/gguf.sh
python lab/pages/results.py speed benchmarks/results
python lab/pages/results.py dca benchmarks/results    after benchmarks/dca.py
python lab/pages/results.py data benchmarks/results   after benchmarks/data.py
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from longctx.eval.results import read_results
from longctx.eval.tables import table
from longctx.eval.tasks.k_max import k_max_figure
from longctx.eval.tasks.perplexity import perplexity_figure
from longctx.train.log import read_metrics

ROOT = Path(__file__).resolve().parents[2]
STEPS = (0, 50, 100, 200)
RECIPES = {"pi": "PI", "direct_ft": "direct fine-tuning"}
PROTOCOL = "sliding_new_tokens"
BEGIN, END = r"<!-- {}: written by [\w/.]+ -->", "<!-- end of {} -->"


def perplexities(results: dict[str, Any]) -> dict[int, float]:
    """Perplexity by window length."""
    rows = results["tasks"]["perplexity"]["result"]["protocols"][PROTOCOL]["rows"]
    return {row["length"]: row["perplexity"] for row in rows}


def verdicts(base: dict[int, float], cells: dict[tuple[str, int], dict[int, float]]) -> list[str]:
    """The three claims, each with what was measured."""
    native = base[min(base)]
    beyond = [n for n in base if n > min(base)]
    claims = [
        ("the base beyond its window, smallest ratio", min(base[n] for n in beyond), ">", 5.0),
        ("PI without tuning, largest ratio", max(cells["pi", 0].values()), "<", 3.0),
        ("PI after 200 steps, largest ratio", max(cells["pi", 200].values()), "<=", 1.0),
    ]
    rows = []
    for name, value, sign, target in claims:
        ratio = value / native
        met = {">": ratio > target, "<": ratio < target, "<=": ratio <= target}[sign]
        rows.append([name, f"{ratio:.3f}", f"{sign} {target:g}", "met" if met else "**missed**"])
    head = ["perplexity over the base's at its own window", "measured", "target", ""]
    return table(head, rows)


def section(out: Path, docs: Path) -> str:
    """The whole section."""
    found = {
        (recipe, step): read_results(out / f"{recipe}-{step}")
        for recipe in RECIPES
        for step in STEPS
    }
    cells = {key: perplexities(results) for key, results in found.items()}
    base = cells["direct_ft", 0]
    lengths = sorted(base)
    rows = [
        [RECIPES[recipe], str(step), *(f"{cells[recipe, step][n]:.2f}" for n in lengths)]
        for recipe in RECIPES
        for step in STEPS
    ]
    lines = ["", "### Perplexity by window length", ""]
    any_result = found["pi", 200]
    settings = any_result["tasks"]["perplexity"]["settings"]
    lines += [
        f"Protocol `{PROTOCOL}`, stride {settings['stride']}, the first "
        f"{settings['document_tokens']:,} tokens of each held-out document; direct fine-tuning at "
        "0 steps is the base model itself.",
        "",
        *table(["method", "steps", *(f"{n:,}" for n in lengths)], rows),
        *verdicts(base, cells),
    ]
    k_max = [
        [RECIPES[r], *(f"{found[r, s]['tasks']['k_max']['result']['k_max']:,}" for s in STEPS)]
        for r in RECIPES
    ]
    quiz = any_result["tasks"]["k_max"]
    lines += [
        "### Effective window k_max (the paper's table 4 in miniature)",
        "",
        f"{quiz['settings']['points']} distances up to {quiz['result']['target']:,} tokens, "
        f"{quiz['settings']['samples']} prompts each, threshold "
        f"{quiz['result']['threshold']:.0%} at every shorter distance.",
        "",
        *table(["method", *(f"{s} steps" for s in STEPS)], k_max),
    ]
    window = read_results(out / "base-256")
    passkey = window["tasks"]["passkey"]["result"]["mean"]
    lines += [
        f"The base model inside its own window of 256: perplexity {perplexities(window)[256]:.2f}, "
        f"passkey {passkey:.1%}.",
        "",
        "### What the runs cost",
        "",
        *costs(out),
    ]
    shown = [found["direct_ft", 0], found["pi", 0], found["direct_ft", 200], found["pi", 200]]
    lines += figures(shown, docs / "figures")
    versions = ", ".join(f"{k} {v}" for k, v in any_result["versions"].items())
    lines += [f"Made by `bash lab/studies/pi.sh`, commit {any_result['commit']}, {versions}.", ""]
    return "\n".join(lines)


def costs(out: Path) -> list[str]:
    """Tokens and seconds of each run."""
    cost = []
    for recipe, title in RECIPES.items():
        steps = read_metrics(out / recipe)
        seconds = sum(s["seconds"] for s in steps)
        tokens = steps[-1]["tokens"]
        cost.append([title, f"{tokens:,}", f"{seconds:.0f}", f"{tokens / seconds:,.0f}"])
    return table(["run", "tokens", "seconds", "tokens/s"], cost)


def figures(shown: list[dict[str, Any]], folder: Path) -> list[str]:
    """Draws perplexity and passkey by distance into `folder`; the lines that show them."""
    folder.mkdir(exist_ok=True)
    curve = perplexity_figure(shown, PROTOCOL, folder / f"perplexity_{PROTOCOL}.png")
    by_distance = k_max_figure(shown, folder / "k_max.png")
    for name in (curve, by_distance):
        (folder / name).with_suffix(".svg").unlink()  # the page shows the PNG
    return [
        f"![Perplexity, {PROTOCOL}](figures/{curve})",
        "",
        f"![Passkey by distance](figures/{by_distance})",
        "",
    ]


def demo(out: Path) -> str:
    """README's table: what `make demo` measured, and on how many tokens each was trained."""
    rows = []
    lengths: list[int] = []
    trained = f"{read_metrics(out / 'dca')[-1]['tokens']:,}"
    for label, tokens, folder in (
        ("the model itself", "", out / "base"),
        ("Dual Chunk Attention", "0", out / "untrained"),
        ("Dual Chunk Attention, `recipe=dca_ft`", trained, out),
    ):
        results = read_results(folder)
        cells = perplexities(results)
        lengths = sorted(cells)
        quiz = results["tasks"]["passkey"]["result"]["cells"]
        found = [[c["rate"] for c in quiz if c["length"] == n] for n in lengths]
        keys = [f"{sum(r) / len(r):.0%}" for r in found]
        rows.append([label, tokens, *(f"{cells[n]:.1f}" for n in lengths), *keys])
    head = ["lab model, window 256", "trained on, tokens"]
    head += [f"perplexity at {n:,}" for n in lengths] + [f"keys at {n:,}" for n in lengths]
    settings = results["tasks"]["perplexity"]["settings"]
    prompts = sum(c["samples"] for c in quiz if c["length"] == lengths[0])
    note = (
        f"Perplexity by `{PROTOCOL}`, stride {settings['stride']}, of texts held out; keys: share "
        f"of passkeys found, {prompts} prompts a length over {len(found[0])} depths. Made by "
        f"`make demo`, commit {results['commit']}."
    )
    return "\n".join(["", *table(head, rows), note, ""])


def asset(out: Path) -> str:
    """What the lab model itself can do, for its README."""
    results = read_results(out / "base-256")
    protocols = results["tasks"]["perplexity"]["result"]["protocols"]
    cells = results["tasks"]["passkey"]["result"]["cells"]
    rows = [
        [f"perplexity, `{n}`", f"{p['rows'][0]['perplexity']:.2f}"] for n, p in protocols.items()
    ]
    rows += [
        [f"passkey, depth {c['depth']:g} ({c['samples']} prompts)", f"{c['rate']:.0%}"]
        for c in cells
    ]
    rows.append(["passkey, mean", f"{results['tasks']['passkey']['result']['mean']:.1%}"])
    return "\n".join(["", *table(["inside 256 tokens, held-out texts", ""], rows)])


def gguf(out: Path) -> str:
    """A GGUF checkpoint as it is, and with PI untrained."""
    rows = []
    lengths: list[int] = []
    for name in ("base", "pi"):
        results = read_results(out / name)
        cells = perplexities(results)
        lengths = sorted(cells)
        quiz = results["tasks"]["passkey"]["result"]["cells"]
        found = [[c["rate"] for c in quiz if c["length"] == n] for n in lengths]
        rope = f"{results['rope']['name']}, factor {results['rope']['factor']:g}"
        rates = [f"{sum(r) / len(r):.0%}" for r in found]
        rows.append([results["label"], rope, *(f"{cells[n]:.2f}" for n in lengths), *rates])
    head = ["model", "rope", *(f"perplexity at {n:,}" for n in lengths)]
    head += [f"passkey at {n:,}" for n in lengths]
    return "\n".join(["", *table(head, rows), f"Made by `bash lab/studies/gguf.sh`, commit "
                      f"{results['commit']}.", ""])  # fmt: skip


def speed(out: Path) -> str:
    """The ratios that the benchmarks kept, one row each."""
    rows = []
    for file in sorted(out.glob("trainer_*.json")):
        facts = json.loads(file.read_text())
        spread = f"{facts['ratios'][0]:.3f} to {facts['ratios'][-1]:.3f}"
        share = facts["arithmetic_bound_seconds"] / facts["seconds_per_step"]["trainer"]
        rows.append(
            [
                facts["claim"],
                f"{facts['median_of_ratios']:.3f} ({spread})",
                f"<= {facts['target']:g}",
                f"{share:.0%}",
                facts["device"],
                f"`python {facts['command']}`",
            ]
        )
    head = ["claim", "median ratio (all pairs)", "target", "of the arithmetic bound", "device", ""]
    return "\n".join(["", *table(head, rows)])


def dca(out: Path) -> str:
    """Dual Chunk Attention beside plain attention, a table for each device."""
    lines = [""]
    for file in sorted(out.glob("dca_*.json")):
        kept = json.loads(file.read_text())
        rows = []
        for row in kept["rows"]:
            time = row["ratio"] <= kept["target"]
            memory = row["memory_ratio"] <= kept["memory_target"]
            bound = row["arithmetic_bound_seconds"] / row["seconds"]["dca"]
            rows.append(
                [
                    row["pass"],
                    f"{row['length']:,}",
                    *(f"{row['seconds'][side]:.3g}" for side in ("dca", "sdpa")),
                    f"{row['ratio']:.3f} ({row['ratios'][0]:.3f} to {row['ratios'][-1]:.3f})",
                    ("met" if time else "**missed**") if row["length"] >= 8192 else "",
                    f"{bound:.0%}",
                    f"{row['memory_ratio']:.3f}",
                    ("met" if memory else "**missed**") if row["length"] >= 8192 else "",
                ]
            )
        shapes, numbers = kept["shapes"], kept["numbers"]
        lines += [
            f"{kept['device']}, {kept['threads']} thread(s), torch {kept['torch']}: "
            f"{shapes['heads']} heads of {shapes['dim']}, {shapes['dtype']}, window "
            f"{shapes['window']:,} (s = {numbers['chunk_len']:,}, w = {numbers['local_window']:,}, "
            f"c = {numbers['max_positions']:,}). Targets from 8,192 tokens on: time "
            f"{kept['target']:g}, peak memory (inputs included) {kept['memory_target']:g}.",
            "",
        ]
        head = ["pass", "tokens", "DCA, s", "SDPA, s", "median ratio (all pairs)", "time"]
        head += ["of the arithmetic bound", "memory ratio", "memory"]
        lines += table(head, rows)
        lines += [f"Made by `python {kept['command']}`, commit {kept['commit']}.", ""]
    return "\n".join(lines)


def data(out: Path) -> str:
    """The claims about preparation and the loader, one row each, then what stands behind them."""
    rows, notes = [], []
    for file in sorted(out.glob("data_*.json")):
        kept = json.loads(file.read_text())
        for claim in kept["claims"]:
            median, target = claim["median"], claim["target"]
            met = {"<": median < target, "<=": median <= target, ">=": median >= target}
            spread = f"{claim['values'][0]:.3g} to {claim['values'][-1]:.3g}"
            rows.append(
                [
                    claim["claim"],
                    f"{median:.3g} ({spread})",
                    f"{claim['sign']} {target:g}",
                    "met" if met[claim["sign"]] else "**missed**",
                    f"`{kept['command']}`",
                ]
            )
            facts = [f"{k.replace('_', ' ')} {v:,.4g}" for k, v in claim["facts"].items()]
            notes += [f"- {claim['claim']}: {', '.join(facts)}."] if facts else []
        where = f"{kept['device']}, Python {kept['python']}, commit {kept['commit']}"
        notes.append(f"- `{kept['command']}`: {where}.")
    head = ["claim", "median (all)", "target", "", "command"]
    figure = ROOT / "outputs" / "benchmark_data" / "filtered" / "summary.png"
    shutil.copyfile(figure, ROOT / "docs" / "figures" / "filter_summary.png")
    drawn = "![Lengths before and after the filter](figures/filter_summary.png)"
    return "\n".join(["", *table(head, rows), *notes, "", drawn, ""])


def replace(page: Path, name: str, text: str) -> None:
    """Puts `text` between the marks of section `name` of `page`."""
    whole, end = page.read_text(), END.format(name)
    (begin,) = re.findall(BEGIN.format(name), whole)
    before, rest = whole.split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def main(which: str, out: Path) -> None:
    """Rewrites the sections that `which` names."""
    page = ROOT / "docs" / "results.md"
    if which == "lab":
        replace(page, "lab", section(out, ROOT / "docs"))
        replace(ROOT / "assets" / "lab-llama" / "README.md", "lab", asset(out))
    elif which == "demo":
        replace(ROOT / "README.md", "demo", demo(out))
        shutil.copyfile(out / "passkey.png", ROOT / "docs" / "figures" / "demo_passkey.png")
    elif which == "gguf":
        replace(page, "gguf", gguf(out))
    elif which == "dca":
        replace(page, "dca", dca(out))
    elif which == "data":
        replace(ROOT / "docs" / "data.md", "data", data(out))
    else:
        replace(page, "speed", speed(out))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
