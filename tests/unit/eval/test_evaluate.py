import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from longctx import cli
from longctx.config import ModelConfig, RopeConfig
from longctx.data.store import StoreWriter, tokenizer_sha256
from longctx.errors import UserError
from longctx.eval import evaluate as run
from longctx.eval import quiz
from longctx.eval.config import EvalConfig, found_tasks
from longctx.eval.provenance import identity, trained
from longctx.eval.tasks.contexts import Contexts
from longctx.eval.tasks.k_max import KMax
from longctx.eval.tasks.passkey import Passkey
from longctx.eval.tasks.perplexity import Perplexity
from longctx.eval.tasks.qa import Qa
from longctx.eval.tasks.retrieval_perplexity import RetrievalPerplexity
from longctx.eval.tasks.template import Template
from longctx.models import load
from longctx.models.load import build_model

pytestmark = pytest.mark.long

TOKENIZER = Path(__file__).resolve().parents[3] / "assets" / "lab-llama"
CONTEXTS = Contexts(["cepe_tail_matched"], [0, 2], 32, 64, 32, True, 2, None)
RETRIEVAL = RetrievalPerplexity(None, [0, 2], [2], 32, 64, 32, 1.0, 2, None)
QA = Qa(None, "bm25", [2], ["retrieved"], 1, 1, 2, 3, 400)
ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


def questions():
    """A file of questions in HotpotQA's layout."""
    return [
        {
            "_id": f"h{i}",
            "question": f"What is {word}?",
            "answer": word,
            "supporting_facts": [[word, 0]],
            "context": [[word, [f"It is a {word}."]]],
        }
        for i, word in enumerate(("cat", "dog", "hen", "cow"))
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny random model and a store of its tokenizer."""
    folder = tmp_path_factory.mktemp("made")
    build_model(ARCHITECTURE).save_pretrained(folder / "model")
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder / "model")
    (folder / "other").mkdir()
    (folder / "other" / "tokenizer.json").write_text("{}")
    sha = tokenizer_sha256(folder / "model")
    rng = np.random.default_rng(0)
    with StoreWriter(folder / "store", sha, 4096, 1, 2, {}) as writer:
        for length in (300, 100, 260):
            writer.add([1, *rng.integers(4, 4096, length - 2).tolist(), 2])
    (folder / "qa.json").write_text(json.dumps(questions()))
    with StoreWriter(folder / "foreign", "f" * 64, 4096, 1, 2, {}) as writer:
        writer.add([1] + [5] * 500 + [2])
    return folder


@pytest.fixture
def cfg(made, tmp_path):
    arguments = [f"model={made / 'model'}", "out=x", "tasks=[passkey]", "lengths=[256,128]"]
    return replace(
        cli.compose(arguments, EvalConfig, "evaluate", "eval_schema"),
        model=ModelConfig("tiny", str(made / "model"), {}, None),
        label=None,
        rope=RopeConfig(),
        dtype=None,
        device="cpu",
        tasks=["perplexity", "passkey", "k_max"],
        lengths=[256, 128],
        held_out=str(made / "store"),
        out=str(tmp_path / "out"),
        compare=[],
        samples=2,
        batch_tokens=1024,
        seed=0,
        perplexity=Perplexity(
            ["sliding_new_tokens", "single_pass_buckets", "token_matched"], 32, 32, 2, None, None
        ),
        passkey=Passkey([0.0, 1.0], "teacher_forced"),
        k_max=KMax(4, 0.2, "teacher_forced"),
        contexts=CONTEXTS,
        retrieval_perplexity=RETRIEVAL,
        qa=replace(QA, data=str(made / "qa.json")),
        template=Template(["key"], [0], 32, 1, 4),
    )


@pytest.fixture
def calls(monkeypatch):
    """Names of the tasks that were computed."""
    seen = []

    def counted(name, inner):
        def wrapper(*args):
            seen.append(name)
            return inner(*args)

        return wrapper

    for name, kind in found_tasks().items():
        monkeypatch.setattr(kind, "run", counted(name, kind.run))
    return seen


def lines(cfg):
    return [json.loads(line) for line in (Path(cfg.out) / "samples.jsonl").open()]


def test_all_tasks_are_stored_and_kept(cfg, calls, monkeypatch):
    results, report = run.evaluate(cfg)
    assert calls == cfg.tasks
    protocols = results["tasks"]["perplexity"]["result"]["protocols"]
    for protocol in protocols.values():
        assert (protocol["documents"], protocol["skipped"]) == (2, 1)
        assert protocol["bos"] == "document_start"
        assert [row["length"] for row in protocol["rows"]] == [128, 256]
    assert [r["tokens"] for r in protocols["sliding_new_tokens"]["rows"]] == [299 + 259] * 2
    assert 3000 < protocols["sliding_new_tokens"]["rows"][0]["perplexity"] < 6000
    assert results["attention"] == {"name": "full"} and results["native_window"] == 128
    assert len(lines(cfg)) == 2 * 2 * 2 + 4 * 2
    assert "tiny" in report

    monkeypatch.setattr(load, "load_model", None)  # nothing to compute: no model is loaded
    again, text = run.evaluate(cfg)
    assert calls == cfg.tasks and text == report
    assert again["tasks"] == results["tasks"] and len(lines(cfg)) == 16


def test_tasks_that_read_contexts(cfg, calls):
    own = replace(cfg, tasks=["contexts", "retrieval_perplexity", "qa"], lengths=[])
    results, report = run.evaluate(own)
    assert calls == own.tasks
    contexts = results["tasks"]["contexts"]["result"]["protocols"]["cepe_tail_matched"]
    assert (contexts["documents"], contexts["skipped"]) == (2, 1)
    assert [(r["count"], r["context"]) for r in contexts["rows"]] == [
        (0, "none"),
        (2, "own"),
        (2, "other"),
    ]
    assert {r["tokens"] for r in contexts["rows"]} == {2 * 2 * 32}
    retrieval = results["tasks"]["retrieval_perplexity"]["result"]
    assert retrieval["pool"] == 298 // 32 + 98 // 32 + 258 // 32
    found = lines(cfg)
    passages = [r["passages"] for r in found if r.get("method") == "contexts"]
    own_text = [r["document"] for r in found if r.get("method") == "contexts"]
    assert all(p[0] != d for places, d in zip(passages, own_text, strict=True) for p in places)
    assert results["tasks"]["qa"]["settings"]["seed"] == 0
    assert len([r for r in found if r["task"] == "qa"]) == 2
    for name in ("contexts_cepe_tail_matched.png", "retrieval_perplexity.png", "qa.png"):
        assert (Path(cfg.out) / name).exists() and f"({name})" in report
    run.evaluate(own)
    assert calls == own.tasks


def test_only_what_changed_is_computed_again(cfg, calls):
    run.evaluate(replace(cfg, tasks=["passkey", "k_max"]))
    run.evaluate(replace(cfg, tasks=["passkey", "k_max"], passkey=Passkey([0.5], "generate")))
    assert calls == ["passkey", "k_max", "passkey"]
    found = lines(cfg)
    assert len(found) == 2 * 2 + 4 * 2
    assert {s["mode"] for s in found if s["task"] == "passkey"} == {"generate"}


def test_efficiency_states_what_it_was_measured_on(cfg, calls):
    own = replace(cfg, tasks=["efficiency"], efficiency=replace(cfg.efficiency, repetitions=2))
    results, report = run.evaluate(own)
    task = results["tasks"]["efficiency"]
    assert [row["length"] for row in task["result"]["rows"]] == [128, 256]
    assert task["settings"]["device"] and task["settings"]["dtype"] == "fp32"
    assert "kernel `" in report and "batch 1, 2 repetitions of 8 new tokens" in report
    run.evaluate(own)
    assert calls == ["efficiency"]


def test_another_model_starts_anew(cfg, calls):
    run.evaluate(replace(cfg, tasks=["passkey"]))
    results, _ = run.evaluate(replace(cfg, tasks=["k_max"], rope=RopeConfig("pi")))
    assert calls == ["passkey", "k_max"] and list(results["tasks"]) == ["k_max"]
    assert results["label"] == "tiny + pi"
    assert results["rope"]["factor"] == 2 and results["window"] == 256
    assert results["native_window"] == 128
    assert {line["task"] for line in lines(cfg)} == {"k_max"}  # no samples of the other model


def test_a_type_that_is_left_open_is_that_of_the_device(cfg):
    assert identity(cfg) == identity(replace(cfg, dtype="fp32"))
    assert identity(cfg) != identity(replace(cfg, device="meta"))  # no CPU: bf16


def test_files_of_a_model_below_the_home_directory_are_looked_at(cfg, made, monkeypatch):
    monkeypatch.setenv("HOME", str(made))
    assert identity(replace(cfg, model=ModelConfig("tiny", "~/model", {}, None)))["files"]


def write_run(folder, tokens, start):
    (folder / "hf").mkdir(parents=True)
    lines = [json.dumps({"step": i, "tokens": tokens * i // 2}) for i in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text(f"model: {{name: x, path: {start}}}\n")
    return str(folder / "hf")


def test_tokens_of_a_run_and_of_those_before_it(tmp_path):
    first = write_run(tmp_path / "first", 1000, "a/hub")
    second = write_run(tmp_path / "second", 200, first)
    assert trained(first) == {"tokens": 1000, "start": "a/hub"}
    assert trained(second) == {"tokens": 1200, "start": "a/hub"}
    scratch = write_run(tmp_path / "scratch", 50, "null")
    assert trained(scratch) == {"tokens": 50, "start": None}
    for path in ("a/hub", str(tmp_path / "first"), str(tmp_path / "none" / "hf")):
        assert trained(path) is None
    (tmp_path / "first" / "metrics.jsonl").write_text("")
    assert trained(second) == {"tokens": 200, "start": first}


def test_the_results_keep_what_the_run_recorded(cfg, made, tmp_path):
    path = write_run(tmp_path / "run", 4096, "base")
    shutil.copytree(made / "model", path, dirs_exist_ok=True)
    model = ModelConfig("tiny", path, {}, None)
    results, report = run.evaluate(replace(cfg, tasks=["k_max"], model=model))
    assert results["trained"] == {"tokens": 4096, "start": "base"}
    assert "| run | 4,096 |" in report
    results, report = run.evaluate(replace(cfg, tasks=["k_max"], out=cfg.out + "2"))
    assert "trained" not in results and "trained on" not in report


def test_each_task_keeps_how_it_was_made(cfg, monkeypatch):
    for number, task in enumerate(("passkey", "k_max")):
        monkeypatch.setattr("sys.orig_argv", ["evaluate.py", f"run={number}"])
        results, report = run.evaluate(replace(cfg, tasks=[task]))
    assert results["tasks"]["passkey"]["made"]["command"] == "evaluate.py run=0"
    assert "- tiny (passkey): by `evaluate.py run=0`, seed 0" in report
    assert "- tiny (k_max): by `evaluate.py run=1`, seed 0" in report


def test_earlier_results_join_the_report(cfg, tmp_path):
    run.evaluate(replace(cfg, tasks=["k_max"], label="before"))
    later = replace(cfg, tasks=["k_max"], label="after", out=str(tmp_path / "2"), seed=5)
    _, report = run.evaluate(replace(later, compare=[cfg.out]))
    assert "| before |" in report and "| after |" in report
    assert "before, k_max: seed is 0, not 5 as for after" in report


def test_earlier_results_alone_are_joined_without_a_model(cfg, tmp_path, monkeypatch):
    run.evaluate(replace(cfg, tasks=["k_max"], label="before"))
    monkeypatch.setattr(run, "Subject", None)
    joined = tmp_path / "joined"
    only = replace(cfg, lengths=[], compare=[cfg.out, cfg.out], out=str(joined))
    _, report = run.evaluate(only)
    assert "| before |" in report and "| before (2) |" in report
    assert (joined / "report.html").exists() and not (joined / "results.json").exists()
    own = Path(cfg.out) / "results.json"
    kept = own.read_text()
    _, report = run.evaluate(replace(only, compare=[cfg.out], out=cfg.out))
    assert report.count("| before |") >= 1 and own.read_text() == kept
    with pytest.raises(UserError, match=r"nowhere: no results.json here"):
        run.evaluate(replace(only, compare=["nowhere"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["pass"]}, "tasks='pass' is not one of perplexity, passkey, k_max, "),
        ({"held_out": None}, r"needs held_out=DIR"),
        ({"lengths": [32]}, r"stride=32 must be shorter than every window of lengths=\[32\]"),
        ({"lengths": [301]}, "ask for 301 tokens, but the longest document of .*store has 300"),
        ({"held_out": "{made}/foreign"}, "was made with tokenizer ffff"),
        ({"held_out": "{made}/none"}, "no such token store"),
        ({"tasks": ["contexts"], "held_out": None}, r"tasks=\[contexts\] needs held_out=DIR"),
        (
            {"tasks": ["contexts"], "contexts": replace(CONTEXTS, counts=[8])},
            "contexts.counts of 32 tokens behind 64 ask for 320 tokens, but the longest",
        ),
        (
            {"tasks": ["contexts"], "contexts": replace(CONTEXTS, counts=[7])},
            "one document of 288 tokens or more: contexts of another document need two",
        ),
        (
            {
                "tasks": ["retrieval_perplexity"],
                "retrieval_perplexity": replace(RETRIEVAL, store="{made}/foreign"),
            },
            "was made with tokenizer ffff",
        ),
        ({"tasks": ["qa"], "qa": replace(QA, data=None)}, "needs qa.data=FILE"),
        ({"tasks": ["qa"], "qa": replace(QA, data="{made}/no.json")}, "no.json: no such file"),
        ({"tasks": ["qa"], "qa": replace(QA, data="{made}/qa.json", window=9)}, "window of 9"),
        ({"compare": ["{made}"]}, "no results.json here"),
        ({"tasks": ["qa"], "parallel_sp": 2}, r"parallel_sp=2: tasks=\[qa\] decodes"),
        (
            {"model": ModelConfig("tiny", "{made}/model", {}, "{made}/other")},
            "other is not the tokenizer that .*model comes with",
        ),
        ({"device": "cuda:99"}, "device=cuda:99"),
        ({"model": ModelConfig("no", "{made}/no", {}, "{made}/model")}, "no"),
        ({"model": ModelConfig("no", None, {}, None)}, "has no weights"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(cfg, made, change, message):
    def here(value):
        if isinstance(value, str):
            return value.format(made=made)
        if isinstance(value, ModelConfig) and value.path:
            return replace(value, path=here(value.path), tokenizer=here(value.tokenizer))
        if isinstance(value, Qa):
            return replace(value, data=here(value.data))
        if isinstance(value, RetrievalPerplexity):
            return replace(value, store=here(value.store))
        return [here(v) for v in value] if isinstance(value, list) else value

    with pytest.raises(UserError, match=message) as caught:
        run.evaluate(replace(cfg, **{key: here(value) for key, value in change.items()}))
    assert "\n" not in str(caught.value)
    assert not Path(cfg.out).exists()


class Killed(BaseException):
    """Not an error that anybody handles."""


def test_a_killed_evaluation_goes_on_at_the_next_sample(cfg, monkeypatch):
    """Bit for bit as if nothing had happened, and no prompt is answered twice."""
    own = replace(cfg, tasks=["perplexity", "passkey"], batch_tokens=512, samples=4)
    whole, _ = run.evaluate(replace(own, out=own.out + "2"))
    answer, asked = quiz._teacher_forced, []

    def dying(model, batch):
        if len(asked) == 3:
            raise Killed
        asked.append([t.prompt.key for t in batch])
        return answer(model, batch)

    monkeypatch.setattr(quiz, "_teacher_forced", dying)
    with pytest.raises(Killed):
        run.evaluate(own)
    assert len(list((Path(own.out) / "journal").iterdir())) == 1
    with pytest.raises(Killed):
        run.evaluate(own)  # the next prompt, and no earlier one, is what dies now
    before = len(asked)
    monkeypatch.setattr(
        quiz,
        "_teacher_forced",
        lambda m, b: asked.append([t.prompt.key for t in b]) or answer(m, b),
    )
    results, _ = run.evaluate(own)
    assert before == 3 and sum(map(len, asked)) == 2 * 2 * 4
    assert results["tasks"] == whole["tasks"]
    assert lines(own) == lines(replace(own, out=own.out + "2"))
    assert not (Path(own.out) / "journal").exists()


def test_two_ranks_get_what_one_process_gets(cfg):
    own = replace(cfg, tasks=[*cfg.tasks, "contexts", "retrieval_perplexity", "qa", "template"])
    own = replace(own, batch_tokens=512)
    alone, _ = run.evaluate(replace(own, out=own.out + "1"))
    barrier, found = threading.Barrier(2, timeout=60), {}

    def rank(number):
        mesh = SimpleNamespace(
            dp_rank=number, dp_size=2, sp_rank=0, sp_group=None, barrier=barrier.wait
        )
        found[number] = run.evaluate(own, mesh)

    threads = [threading.Thread(target=rank, args=(i,), daemon=True) for i in range(2)]
    [t.start() for t in threads]
    [t.join(120) for t in threads]
    assert found[0][0]["tasks"] == found[1][0]["tasks"] == alone["tasks"]
    assert found[0][1] and not found[1][1]
    assert lines(own) == lines(replace(own, out=own.out + "1"))
