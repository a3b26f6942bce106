import json
import re

import pytest

from longctx.errors import UserError
from longctx.eval import figures
from longctx.eval.report import headline_of, write_report
from longctx.eval.results import differences, read_results, write_results
from longctx.eval.tasks import perplexity

pytestmark = pytest.mark.long

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
        "| ours | `runs/x/hf` |  | full | linear (factor=2) | float32 |  | 256 | 512 |",
        "| base | 300.00 ± 0.50 | 300.00 ± 0.50 |",
        "| ours | 12.00 ± 0.50 | 512 |",
        "| ours | 80.0 [49.0, 94.3] | 10.0 [1.8, 40.4] |",
        "| base | 256 | 512 | 2 x 5 | 20 % | generate |",
    ):
        assert line in text.splitlines()
    embedded = [part.split(")")[0] for part in text.split("](")[1:]]
    assert sorted(embedded) == sorted(p.name for p in tmp_path.glob("*.png")) and len(embedded) == 4
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 4 and "http-equiv" in page and "<script" not in page
    assert not re.search(r"""(src|href)=["'](?!#|data:image)""", page)  # nothing is asked for
    for line in text.splitlines():
        for cell in line.strip("| ").split(" | ") if line.startswith("| ours") else ():
            assert f">{cell}<" in page or "`" in cell or "*" in cell, cell
    for name in embedded:
        assert (tmp_path / name).read_bytes().startswith(PNG)
    assert "Not measured alike" not in text


def test_models_of_one_name_are_told_apart_and_a_long_title_is_a_number(tmp_path):
    text = write_report([results("ours"), results("ours"), results("ours (2)")], tmp_path)
    assert text.startswith("# Evaluation: ours, ours (2), ours (2) (2)\n")
    assert "| ours (2) | 12.00 ± 0.50 | 12.00 ± 0.50 |" in text.splitlines()
    many = [results(str(i)) for i in range(5)]
    assert write_report(many, tmp_path).startswith("# 5 models\n")
    assert "place" not in many[0]


def test_a_model_has_one_colour_in_all_figures(tmp_path):
    base = results("base")
    del base["tasks"]["k_max"]
    write_report([base, results("ours")], tmp_path)
    first, second = (colour.lower() for colour in figures.COLOURS[:2])
    names = ("perplexity_sliding_new_tokens.svg", "k_max.svg")
    both, one = ((tmp_path / name).read_text().lower() for name in names)
    assert first in both and second in both
    assert first not in one and second in one


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


def headline(*models):
    lines = list(headline_of(models))
    head, _, *rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    return lines, head, rows


def test_the_headline_has_the_main_number_of_each_task():
    _, head, rows = headline(results("ours", 512), results("base", perplexity=300.0))
    assert head == [
        "model",
        "perplexity at 512 (2 x the window), `single_pass_buckets`",
        "passkey at 256 (inside the window), %",
        "passkey at 512 (2 x the window), %",
        "k_max, tokens",
    ]
    inside, beyond = "80.0 ± 22.7", "10.0 ± 19.3"
    assert rows[0] == ["ours", "**12.00 ± 0.98**", inside, beyond, "256"]
    assert rows[1] == ["base", "300.00 ± 0.98", inside, beyond, "256"]  # a tie is nobody's


def test_a_base_that_is_lost_beyond_its_window_wins_nothing_there():
    """A mean over all lengths would call it the best by what it finds inside."""
    base, ours = results("base"), results("ours", 512)
    for model, rates in ((base, (1, 1, 0, 0)), (ours, (0.8, 0.8, 0.8, 0.8))):
        for cell, rate in zip(model["tasks"]["passkey"]["result"]["cells"], rates, strict=True):
            cell |= {"rate": rate, "samples": 50}
    _, head, rows = headline(base, ours)
    inside, beyond = (head.index(f"passkey at {at}, %") for at in
                      ("256 (inside the window)", "512 (2 x the window)"))  # fmt: skip
    assert rows[0][inside].startswith("**100.0") and not rows[1][inside].startswith("**")
    assert rows[0][beyond] == "0.0 ± 1.8" and rows[1][beyond].startswith("**80.0")
    for cell in ours["tasks"]["passkey"]["result"]["cells"]:
        cell["rate"] = 0  # nobody finds anything beyond: nobody is the best there
    _, _, rows = headline(base, ours)
    assert not any(row[beyond].startswith("**") for row in rows)


def test_models_of_other_windows_share_the_lengths_inside_all_of_them():
    base, wide = results("base"), results("wide") | {"native_window": 4096}
    _, head, _ = headline(base, wide)
    assert "passkey at 256 (inside the window), %" in head and "passkey at 512, %" in head
    _, head, _ = headline(wide)
    assert [name for name in head if "passkey" in name] == ["passkey at 512 (inside the window), %"]


def test_few_tasks_and_lengths_have_a_column_for_each_length():
    base, ours = results("base"), results("ours", 512)
    cells = [
        {"length": n, "depth": 0, "rate": n <= 256, "samples": 50} for n in (128, 256, 512, 1024)
    ]
    for model in (base, ours):
        del model["tasks"]["k_max"]
        model["tasks"]["passkey"]["result"]["cells"] = cells
    _, head, _ = headline(base, ours)
    assert [name for name in head if "passkey" in name] == [
        "passkey at 128 (0.5 x the window), %",
        "passkey at 256 (inside the window), %",
        "passkey at 512 (2 x the window), %",
        "passkey at 1,024 (4 x the window), %",
    ]


def test_tokens_that_models_were_trained_on():
    base, ours, other = results("base"), results("ours", 512), results("other")
    base["model"], other["model"] = "assets/base", "elsewhere"
    assert not any("trained on" in name for name in headline(base, other)[1])
    ours["trained"] = {"tokens": 1234567, "start": "assets/base"}
    lines, head, rows = headline(base, ours, other)
    assert head[1] == "trained on, tokens" and [row[1] for row in rows] == ["0", "1,234,567", "-"]
    assert any("what such a run started from" in line for line in lines)


def test_what_an_interval_cannot_tell_apart_is_not_ranked():
    close, far = results("close", perplexity=12.5), results("far", perplexity=30.0)
    _, _, rows = headline(results("ours"), close, far)
    assert [row[1] for row in rows] == ["**12.00 ± 0.98**", "**12.50 ± 0.98**", "30.00 ± 0.98"]
    _, _, rows = headline(results("ours"), close)
    assert not any("**" in row[1] for row in rows)


def test_what_has_no_interval_is_not_ranked():
    far = results("far")
    far["tasks"]["k_max"]["result"]["k_max"] = 512
    lines, _, rows = headline(results("ours"), far)
    assert [row[4] for row in rows] == ["256", "512"]
    assert any("k_max, effective lengths and times have no interval" in line for line in lines)


def test_numbers_of_other_settings_are_marked_and_win_nothing():
    odd = results("odd", perplexity=1.0)
    odd["tasks"]["perplexity"]["settings"]["stride"] = 512
    lines, _, rows = headline(results("ours"), odd)
    assert rows[1][1] == "1.00 ± 0.98 †" and "**" not in rows[0][1]
    assert any("measured under other settings" in line for line in lines)
    quick = results("quick") | {"dtype": "bfloat16"}
    lines, _, rows = headline(results("ours"), quick)
    assert all(cell.endswith("†") for cell in rows[1][1:])
    assert "quick: dtype is bfloat16, not float32 as for ours" in list(
        differences([results("ours"), quick])
    )


def test_tasks_that_the_first_model_lacks_are_compared_too():
    first, second, third = results("a"), results("b"), results("c", seed=3)
    del first["tasks"]["passkey"]
    assert list(differences([first, second, third])) == ["c, passkey: seed is 3, not 0 as for b"]


def test_values_far_above_the_rest_are_clipped_and_marked(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(perplexity, "save", lambda figure, path: drawn.append(figure) or path.name)
    for worst, clipped in ((1000.0, False), (1e6, True)):
        found = [results("ours"), results("burst", perplexity=worst)]
        perplexity.perplexity_figure(found, "sliding_new_tokens", tmp_path / "p.png")
        (axes,) = drawn.pop().axes
        assert ("clipped, above 1,200" in axes.get_legend_handles_labels()[1]) == clipped
        assert axes.get_ylim()[1] < 5000


def test_an_equal_report_is_the_same_file(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_report([results("ours")], tmp_path / name)
    assert (tmp_path / "a" / "report.html").read_bytes() == (
        tmp_path / "b" / "report.html"
    ).read_bytes()
