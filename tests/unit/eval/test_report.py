import json

import pytest

from longctx.errors import UserError
from longctx.eval.report import differences, read_results, write_report, write_results

PNG = b"\x89PNG"


def results(label, window=256, seed=0, perplexity=12.0):
    def row(length):
        numbers = {"perplexity": perplexity, "perplexity_se": 0.5, "nll": 2.5, "nll_se": 0.04}
        return {"length": length, **numbers, "tokens": 999, "clusters": 3}

    buckets = [{"start": 1, "end": 16, **row(16)}, {"start": 16, "end": 512, **row(512)}]
    facts = {"bos": "document_start", "documents": 3, "skipped": 1}
    protocols = {
        "sliding_new_tokens": {**facts, "stride": 64, "rows": [row(256), row(512)]},
        "single_pass_buckets": {
            **facts,
            "rows": [{**row(512), "bucket_gain": 512, "buckets": buckets}],
        },
    }
    cells = [
        {"length": n, "depth": d, "rate": r, "samples": 5}
        for n, d, r in [(256, 0, 1), (256, 1, 0.5), (512, 0, 0), (512, 1, 0.25)]
    ]
    distances = [{"k": 256, "rate": 1, "samples": 5}, {"k": 512, "rate": 0, "samples": 5}]
    return {
        "label": label,
        "model": "runs/x/hf",
        "attention": {"name": "full"},
        "rope": {"name": "linear", "factor": 2.0},
        "dtype": "float32",
        "native_window": 256,
        "window": window,
        "tasks": {
            "perplexity": {
                "settings": {"stride": 64},
                "result": {"protocols": protocols},
            },
            "passkey": {
                "settings": {"seed": seed},
                "result": {"mode": "generate", "mean": 0.4375, "cells": cells},
            },
            "k_max": {
                "settings": {"threshold": 0.2},
                "result": {
                    "mode": "generate",
                    "target": 512,
                    "k_max": 256,
                    "threshold": 0.2,
                    "cells": distances,
                },
            },
        },
        "versions": {"torch": "2"},
        "commit": None,
        "seed": seed,
        "command": "evaluate.py",
    }


def test_report_has_tables_and_figures(tmp_path):
    text = write_report([results("ours", 512), results("base", perplexity=300.0)], tmp_path)
    assert (tmp_path / "report.md").read_text() == text
    for line in (
        "| ours | `runs/x/hf` | full | linear (factor=2.0) | float32 | 256 | 512 |",
        "| base | 300.00 ± 0.50 | 300.00 ± 0.50 |",
        "| ours | 12.00 ± 0.50 | 512 |",
        "| ours | 75.0 | 12.5 |",
        "| base | 256 | 512 | 2 x 5 | 20 % | generate |",
    ):
        assert line in text.splitlines()
    embedded = [part.split(")")[0] for part in text.split("](")[1:]]
    assert sorted(embedded) == sorted(p.name for p in tmp_path.glob("*.png")) and len(embedded) == 4
    for name in embedded:
        assert (tmp_path / name).read_bytes().startswith(PNG)
    assert "Not measured alike" not in text


def test_a_single_task_is_enough(tmp_path):
    only = results("ours")
    del only["tasks"]["perplexity"], only["tasks"]["k_max"]
    text = write_report([only], tmp_path)
    assert [p.name for p in tmp_path.glob("*.png")] == ["passkey.png"]
    assert "Perplexity" not in text and "k_max" not in text


def test_unequal_settings_are_told(tmp_path):
    ours, other = results("ours"), results("other", seed=7)
    lines = ["other, passkey: seed is 7, not 0 as for ours"]
    assert list(differences([ours, other])) == lines
    assert f"- {lines[0]}" in write_report([ours, other], tmp_path)


def test_results_come_back(tmp_path):
    write_results(results("ours"), tmp_path)
    want = {"format": 1} | results("ours")
    assert read_results(tmp_path) == read_results(tmp_path / "results.json") == want
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no results.json"), ("{", "not readable"), (json.dumps({"format": 9}), "format 1")],
)
def test_foreign_results_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_results(tmp_path)
