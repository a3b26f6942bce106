import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml

from longctx.errors import UserError
from longctx.eval import harness
from longctx.eval.answers import wilson
from longctx.eval.journal import Journal
from longctx.eval.tasks.short import Short
from longctx.models.load import load_model, load_tokenizer
from tests.helpers.fakes import Fake
from tests.helpers.process import ROOT
from tests.helpers.reading import subject

OWN = Short(["piqa", "race"], 6, 150)


def cfg(**changes):
    return SimpleNamespace(short=replace(OWN, **changes), seed=0)


def asked():
    model = Fake(lambda tokens: None)
    model.config = SimpleNamespace(max_position_embeddings=77)
    return subject(model, bos=1)


def inputs(asks):
    return asks.short.inputs(asks)


def run(asks, own):
    return asks.short.run(asks, own)


class Installed:
    """lm-eval as far as it is used: tasks that are known, and what it answers."""

    __version__ = "0.4.13"

    def __init__(self, answer):
        self.answer, self.model = answer, None
        manager = SimpleNamespace(all_tasks=["piqa", "race"])
        self.tasks = SimpleNamespace(TaskManager=lambda include_path: manager)
        self.models = SimpleNamespace(huggingface=SimpleNamespace(HFLM=Asker))

    def simple_evaluate(self, model, tasks, limit, random_seed, **_):
        assert random_seed == 0
        self.model = model
        counts = {task: {"effective": limit} for task in tasks}
        return {"results": dict.fromkeys(tasks, self.answer(model)), "n-samples": counts}


class Asker:
    """Its model: remembers how it was made."""

    def __init__(self, **settings):
        self.settings = settings

    def _loglikelihood_tokens(self, requests, *_):
        return {"acc,none": 0.5}


@pytest.fixture
def install(monkeypatch):
    def with_answer(answer):
        found = Installed(answer)
        monkeypatch.setattr(harness, "harness", lambda tasks: found)
        return found

    return with_answer


def test_it_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = r"short.tasks=\[boolq,mmlu\] need lm-eval: pip install 'longctx\[short\]'"
    with pytest.raises(UserError, match=message) as caught:
        inputs(cfg(tasks=["boolq", "mmlu"]))
    assert "\n" not in str(caught.value)


def test_its_numbers_are_taken(install):
    found = install(lambda model: {"acc,none": 1 / 3, "acc_stderr,none": 0.2})
    assert inputs(cfg()) == {"seed": 0, "lm_eval": "0.4.13"}
    own = asked()
    result, records = run(cfg(), own)
    assert records == [] and [c["kind"] for c in result["cells"]] == ["piqa", "race"]
    cell = result["cells"][0]
    assert (cell["samples"], cell["score"], cell["interval"]) == (6, 1 / 3, list(wilson(2, 6)))
    settings = found.model.settings
    assert settings["max_length"] == 77 and settings["pretrained"] is own.model


def test_all_right_is_no_certainty(install):
    install(lambda model: {"acc,none": 1.0, "acc_stderr,none": 0.0})
    low, high = run(cfg(), asked())[0]["cells"][0]["interval"]
    assert 0.5 < low < 0.7 and high == 1


@pytest.mark.parametrize(
    ("sizes", "fault"),
    [([(70, 7)], None), ([(70, 8)], None), ([(9, 9), (70, 9)], "choice 1 has 79 tokens")],
)
def test_a_prompt_is_never_cut(install, sizes, fault):
    requests = [(("", ""), [0] * prompt, [0] * choice) for prompt, choice in sizes]
    install(lambda model: model._loglikelihood_tokens(requests))
    if fault is None:
        assert run(cfg(), asked())[0]["cells"][0]["score"] == 0.5
    else:
        with pytest.raises(UserError, match=rf"tasks=\[piqa\]: {fault} .* window has 77"):
            run(cfg(), asked())


def unreachable(model):
    raise ConnectionError("no route\nto the host")


@pytest.mark.parametrize(
    ("answer", "task", "message"),
    [
        (unreachable, "piqa", "cannot get its data (no route to the host)"),
        (lambda model: model.generate_until([]), "piqa", "[piqa] decodes; only tasks of choices"),
        (lambda model: {"f1,none": 0.5}, "piqa", "[piqa] reports no accuracy"),
        (None, "mmlu", "short.tasks=[mmlu]: lm-eval has no such task"),
    ],
)
def test_what_cannot_be_asked_is_one_line(install, answer, task, message):
    install(answer)
    with pytest.raises(UserError) as caught:
        run(cfg(tasks=[task]), asked())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_task_files_of_a_folder(tmp_path, install):
    install(None)
    with pytest.raises(UserError, match=r"short.include=.*: no task files"):
        inputs(cfg(include=str(tmp_path)))
    (tmp_path / "a.yaml").write_text("task: a")
    own = cfg(include=str(tmp_path), tasks=["a"])
    before = inputs(own)["include"]
    (tmp_path / "a.yaml").write_text("task: b")
    assert inputs(own)["include"] != before


def test_the_real_one_scores_a_local_task(tmp_path):
    """lm-eval's own code end to end: the likelier choice of each question is found."""
    pytest.importorskip("lm_eval", reason="the rest of this file does without")
    said = ["the sky is blue and the grass is green", "xq zzk vvb wq pp rrt"]
    rows = [
        {"question": f"{i}: what is said?", "choices": said[:: 1 - 2 * (i % 2)], "answer": i % 2}
        for i in range(6)
    ]
    rows.append({"question": "6: what is said?", "choices": said, "answer": 1})
    data = tmp_path / "local.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "local_said", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice", "doc_to_text": "{{question}} Answer:",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(task))
    lab = str(ROOT / "assets" / "lab-llama")
    own = SimpleNamespace(
        model=load_model(lab, dtype="fp32"), tokenizer=load_tokenizer(lab), journal=Journal()
    )
    asks = cfg(tasks=["local_said"], samples=None, include=str(tmp_path))
    [cell] = run(asks, own)[0]["cells"]
    assert cell["samples"] == 7 and cell["score"] == pytest.approx(6 / 7)
