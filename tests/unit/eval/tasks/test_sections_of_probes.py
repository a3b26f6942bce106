from pathlib import Path

from longctx.eval.report import sections

MODEL = {"label": "one", "native_window": 4096, "window": 8192}


def ruler(score, samples=25):
    cells = [
        {"task": t, "length": n, "samples": samples, "score": s,
         "interval": [0.1, 0.9], "variance": 0.0, "empty": 0,
         "tokens": [n - 20, n - 8], "new_tokens": 8}
        for t, s in (("vt", score), ("cwe", 0.5)) for n in (4096, 8192)
    ]  # fmt: skip
    averages = [
        {"length": n, "score": (score + 0.5) / 2, "interval": [0.2, 0.8], "tasks": 2}
        for n in (4096, 8192)
    ]
    return {
        "chat": True, "threshold": 50,
        "rising": 0.5, "falling": 0.4, "truncated_prompts": 0, "averages": averages, "cells": cells,
    }  # fmt: skip


def needle():
    cells = [
        {"length": n, "depth": d, "rate": 1 - d, "samples": 3, "tokens": [n - 9, n]}
        for n in (100, 200) for d in (0.0, 1.0)
    ]  # fmt: skip
    return {"mode": "teacher_forced", "mean": 0.5, "haystack": "held_out", "cells": cells}


def babi():
    cells = [
        {"hops": h, "length": n, "samples": 4, "score": 0.25 * h, "interval": [0.1, 0.9],
         "tokens": [90, 100]}
        for h in (1, 3) for n in (100, 200)
    ]  # fmt: skip
    return {"facts": 10, "haystack": "essays", "guessing": 1 / 6, "cells": cells}


def short():
    ours = {"kind": "continuation", "metric": "acc per token", "samples": 100, "score": 0.5}
    theirs = {"kind": "piqa", "metric": "acc", "samples": 1838, "score": 0.781}
    return {
        "context_tokens": 96,
        "cells": [
            ours | {"interval": [0.4, 0.6], "guessing": 0.25},
            theirs | {"interval": None, "guessing": None},
        ],
    }


def results(label, **tasks):
    entries = {name: {"result": result, "settings": {}} for name, result in tasks.items()}
    return MODEL | {"label": label, "tasks": entries}


def test_all_tables_and_figures(tmp_path):
    models = [
        results("one", ruler=ruler(0.9), needle=needle(), babi=babi(), short=short()),
        results("two", ruler=ruler(0.3)),
        results("few", ruler=ruler(0.9, 24)),
    ]
    text = "\n".join(sections(models, tmp_path))
    assert (
        "| one (chat template) | 2 of 13 | 70.0 [20.0, 80.0] | 70.0 [20.0, 80.0] "
        "| 8,192 [none, 8,192] |" in text
    )
    assert "| 40.0 [20.0, 80.0] | 40.0 [20.0, 80.0] | none [none, 8,192] |" in text
    assert (
        "| few (chat template) | 2 of 13 | 70.0 [20.0, 80.0] | 70.0 [20.0, 80.0] "
        "| too few samples |" in text
    )
    assert "fewer than 25 samples of a task" in text
    assert "average reaches 50" in text and "| one | vt | 90.0 [10.0, 90.0] |" in text
    assert "| 8,172 to 8,184 + 8 |" in text
    assert "| one | 50.0 | 50.0 | 91 to 200 |" in text
    assert "| one | 3 | 75.0 [10.0, 90.0] | 75.0 [10.0, 90.0] | 90 to 100 |" in text
    assert "guessing a place: 16.7" in text
    assert "| one | `continuation` | acc per token | 100 | 50.0 [40.0, 60.0] | 25.0 |" in text
    assert "| one | `piqa` | acc | 1,838 | 78.1 |  |" in text
    for name in ("ruler", "needle", "babi"):
        assert f"({name}.png)" in text and (Path(tmp_path) / f"{name}.png").stat().st_size > 9000


def test_nothing_is_said_of_what_was_not_measured(tmp_path):
    assert list(sections([results("one")], tmp_path)) == []
    assert not list(Path(tmp_path).iterdir())
