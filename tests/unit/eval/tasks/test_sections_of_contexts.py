import pytest

from longctx.eval.report import sections, write_report

FACTS = {
    "model": "x/hf",
    "attention": "full",
    "rope": "none",
    "dtype": "float32",
    "native_window": 256,
    "window": 256,
    "versions": {},
    "commit": None,
    "seed": 0,
    "command": "evaluate.py",
}


def row(perplexity, context_tokens, gain=None, **more):
    numbers = {"perplexity": perplexity, "perplexity_se": 0.5, "tokens": 640, "samples": 10}
    if gain is not None:
        numbers |= {"gain": gain, "gain_se": 0.01}
    return {**numbers, "context_tokens": context_tokens, **more}


def contexts_result(reader, other=True):
    rows = [row(20, 0, 0.0, count=0, context="none"), row(12, 256, 0.5, count=4, context="own")]
    rows += [row(21, 256, -0.1, count=4, context="other")] if other else []
    facts = {"bos": "document_start", "documents": 3, "skipped": 1, "size": 64}
    sizes = {"decoder_tokens": 256, "target_tokens": 64, "contexts_read_by": reader}
    return {"protocols": {"cepe_tail_matched": {**facts, **sizes, "rows": rows}}}


def retrieval_result():
    rows = [row(20, 0, 0.0, method="none", k=0), row(15, 128, 0.3, method="contexts", k=2)]
    rows.append(row(17, 128, 0.2, method="replug", k=2, effective_passages=1.25))
    sizes = {"size": 64, "decoder_tokens": 192, "target_tokens": 128, "pool": 1234}
    return {**sizes, "temperature": 1.0, "contexts_read_by": "encoder", "rows": rows}


def qa_result():
    def cell(setting, k, em, encoded=0):
        shares = {"em": em, "em_interval": [em - 0.1, em + 0.1], "sub_em": em, "f1": em}
        shares |= {"sub_em_interval": [0.0, 1.0], "f1_interval": [0.0, 1.0], "gold_found": 0.75}
        tokens = {"tokens": [100, 1200], "context_tokens": [encoded, 2 * encoded]}
        return {"setting": setting, "k": k, "questions": 40, **shares, **tokens}

    cells = [cell("retrieved", 2, 0.25), cell("retrieved", 5, 0.5, 300), cell("last", 5, 0.4)]
    cells += [cell("gold_only", None, 0.6), cell("no_gold", 5, 0.2)]
    return {"pool": 1204, "ranking": "bm25", "demonstrations": 2, "cells": cells}


def model(label, **tasks):
    settings = {name: {"settings": {}, "result": result} for name, result in tasks.items()}
    return {**FACTS, "label": label, "tasks": settings}


@pytest.fixture
def models():
    ours = model(
        "cepe",
        contexts=contexts_result("encoder"),
        retrieval_perplexity=retrieval_result(),
        qa=qa_result(),
    )
    return [ours, model("plain", contexts=contexts_result("decoder", other=False))]


def test_tables(models, tmp_path):
    lines = list(sections(models, tmp_path))
    for wanted in (
        "| model | read by | context | 0 | 4 |",
        "| cepe | encoder | right before it | 20.00 ± 0.50 | 12.00 ± 0.50 (gain 0.500 ± 0.010) |",
        "| cepe | encoder | of another document | 20.00 ± 0.50 | 21.00 ± 0.50 "
        "(gain -0.100 ± 0.010) |",
        "| plain | decoder | right before it | 20.00 ± 0.50 | 12.00 ± 0.50 (gain 0.500 ± 0.010) |",
        "| model | passages | read by | 0 | 2 |",
        "| cepe | RePlug | decoder | 20.00 ± 0.50 | 17.00 ± 0.50 (gain 0.200 ± 0.010), 1.2 mixed |",
        "| cepe | retrieved | 2 | 25.0 [15.0, 35.0] | 25.0 [0.0, 100.0] | 25.0 [0.0, 100.0] | "
        "75.0 | 100 to 1,200 |",
        "| cepe | retrieved | 5 | 50.0 [40.0, 60.0] | 50.0 [0.0, 100.0] | 50.0 [0.0, 100.0] | "
        "75.0 | 100 to 1,200 + 300 to 600 encoded |",
        "| cepe | gold_only |  | 60.0 [50.0, 70.0] | 60.0 [0.0, 100.0] | 60.0 [0.0, 100.0] | "
        "75.0 | 100 to 1,200 |",
    ):
        assert wanted in lines
    assert not any("plain" in line and "another" in line for line in lines)


def test_the_report_has_sections_and_figures(models, tmp_path):
    text = write_report(models, tmp_path)
    assert "## Perplexity behind contexts, `cepe_tail_matched`" in text
    names = {"contexts_cepe_tail_matched.png", "retrieval_perplexity.png", "qa.png"}
    assert {p.name for p in tmp_path.glob("*.png")} == names
    for name in names:
        assert f"({name})" in text
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_nothing_without_results(tmp_path):
    assert list(sections([model("bare")], tmp_path)) == []
