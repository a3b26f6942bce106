"""Tables of the tasks that read contexts: perplexity behind contexts, retrieval, and QA."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longctx.eval.context_figures import contexts_figure, qa_figure, retrieval_figure
from longctx.eval.figures import Results, protocols_of, result_of
from longctx.eval.tables import image, plus_minus, table

NOTES = {
    "cepe_tail_matched": "The same decoder windows and scored tokens in every column, only the "
    "number of contexts before them differs",
    "cepe_tail": "Windows of contexts and decoder tokens slide by the scored ones, so each column "
    "scores other text",
}
CONTEXTS = {"none": "none", "own": "right before it", "other": "of another document"}
METHODS = {"contexts": "all in one pass", "replug": "RePlug"}
SCORES = {"em": "EM", "sub_em": "sub-EM", "f1": "F1"}


def context_sections(models: Sequence[Results], out: Path) -> Iterator[str]:
    """The lines of all tables and figures that there are results for."""
    yield from _contexts(models, out)
    yield from _retrieval(models, out)
    yield from _qa(models, out)


def _cell(row: dict[str, Any]) -> str:
    """Perplexity, and in brackets by how much the loss is below that without contexts."""
    text = plus_minus(row["perplexity"], row["perplexity_se"], 2)
    if row.get("gain") is not None and row["context_tokens"]:
        text += f" (gain {plus_minus(row['gain'], row['gain_se'], 3)})"
    if "effective_passages" in row:
        text += f", {row['effective_passages']:.1f} mixed"
    return text


def _contexts(models: Sequence[Results], out: Path) -> Iterator[str]:
    names = dict.fromkeys(n for m in models for n in protocols_of(m, "contexts"))
    for name in names:
        found = [m for m in models if name in protocols_of(m, "contexts")]
        own = protocols_of(found[0], "contexts")[name]
        yield from (f"## Perplexity behind contexts, `{name}`", "")
        yield f"{NOTES[name]}. Columns: contexts of {own['size']} tokens."
        yield (
            f"The last {own['target_tokens']} of {own['decoder_tokens']} decoder tokens are "
            f"scored; {own['documents']} documents, {own['skipped']} shorter ones skipped, "
            f"{own['rows'][-1]['tokens']:,} tokens scored in the last column; BOS at the "
            f"{own['bos'].replace('_', ' ')}. Every sample has as many scored tokens, so the mean "
            "over samples is the mean over tokens; ± is one standard error; gain: fall of the "
            "loss against no context, nats a token."
        )
        yield ""
        counts = sorted(
            {r["count"] for m in found for r in protocols_of(m, "contexts")[name]["rows"]}
        )
        rows = []
        for model in found:
            result = protocols_of(model, "contexts")[name]
            for kind in ("own", "other"):
                kinds = ("none", kind)
                cells = {r["count"]: _cell(r) for r in result["rows"] if r["context"] in kinds}
                if any(r["context"] == kind for r in result["rows"]) or kind == "own":
                    numbers = [cells.get(n, "") for n in counts]
                    rows.append(
                        [model["label"], result["contexts_read_by"], CONTEXTS[kind], *numbers]
                    )
        yield from table(["model", "read by", "context", *map(str, counts)], rows)
        figure = contexts_figure(found, name, out / f"contexts_{name}.png")
        yield from image(f"Perplexity behind contexts, {name}", figure)


def _retrieval(models: Sequence[Results], out: Path) -> Iterator[str]:
    found = [(m, r) for m in models if (r := result_of(m, "retrieval_perplexity"))]
    if not found:
        return
    own = found[0][1]
    yield from ("## Perplexity with retrieved passages", "")
    yield (
        f"Passages of {own['size']} tokens of other documents, best of {own['pool']:,} by BM25; "
        f"the query is the first {own['decoder_tokens'] - own['target_tokens']} of "
        f"{own['decoder_tokens']} decoder tokens, the rest is scored, the same in every column. "
        f"RePlug mixes by the softmax of scores / {own['temperature']:g}; mixed: exp(entropy) of "
        "its weights. "
        "± is one standard error; gain: fall of the loss against no passage, nats a token."
    )
    yield ""
    counts = sorted({r["k"] for _, result in found for r in result["rows"]})
    rows = []
    for model, result in found:
        for method in ("contexts", "replug"):
            kinds = ("none", method)
            if any(r["method"] == method for r in result["rows"]):
                cells = {r["k"]: _cell(r) for r in result["rows"] if r["method"] in kinds}
                reader = result["contexts_read_by"] if method == "contexts" else "decoder"
                numbers = [cells.get(k, "") for k in counts]
                rows.append([model["label"], METHODS[method], reader, *numbers])
    yield from table(["model", "passages", "read by", *map(str, counts)], rows)
    figure = retrieval_figure([m for m, _ in found], out / "retrieval_perplexity.png")
    yield from image("Perplexity with retrieved passages", figure)


def _percent(row: dict[str, Any], key: str) -> str:
    low, high = row[f"{key}_interval"]
    return f"{100 * row[key]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _qa(models: Sequence[Results], out: Path) -> Iterator[str]:
    found = [(m, r) for m in models if (r := result_of(m, "qa"))]
    if not found:
        return
    own = found[0][1]
    yield from ("## Questions over passages", "")
    yield (
        f"{own['cells'][0]['questions']} questions, {own['pool']:,} passages ranked by "
        f"{own['ranking']}, demonstrations: {own['demonstrations']}; greedy, an answer ends at a "
        "newline; per cent with 95% intervals (Wilson for EM and sub-EM, bootstrap for F1); gold "
        "found: questions all of whose gold passages are among the k; prompts truncated: 0."
    )
    yield ""
    rows = []
    for model, result in found:
        for row in result["cells"]:
            tokens = f"{row['tokens'][0]:,} to {row['tokens'][1]:,}"
            if row["context_tokens"][1]:
                tokens += f" + {row['context_tokens'][0]:,} to {row['context_tokens'][1]:,} encoded"
            if row.get("passages_cut"):
                tokens += f", {row['passages_cut']:,} passages in several contexts"
            cells = ["" if row["k"] is None else str(row["k"])]
            cells += [_percent(row, key) for key in SCORES]
            cells += [f"{100 * row['gold_found']:.1f}", tokens]
            rows.append([model["label"], row["setting"], *cells])
    head = ["model", "passages", "k", *SCORES.values(), "gold found", "prompt tokens"]
    yield from table(head, rows)
    figure = qa_figure([m for m, _ in found], out / "qa.png")
    yield from image("Questions over k passages", figure)
