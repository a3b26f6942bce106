"""The probes through `evaluate`: a tiny random model, the lab's tokenizer, real generation."""

import json
import shutil
from pathlib import Path

import pytest

from longctx import cli
from longctx.data.store import StoreWriter, tokenizer_sha256
from longctx.errors import UserError
from longctx.eval import evaluate as run
from longctx.eval.config import EvalConfig
from longctx.eval.tasks.ruler import NEW_TOKENS
from longctx.models.load import build_model, load_tokenizer
from tests.helpers.material import ESSAY, write_material

pytestmark = pytest.mark.long

TOKENIZER = Path(__file__).resolve().parents[3] / "assets" / "lab-llama"
ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes")
    build_model(ARCHITECTURE).save_pretrained(folder / "model")
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder / "model")
    encode = load_tokenizer(str(folder / "model")).encode
    sha = tokenizer_sha256(folder / "model")
    with StoreWriter(folder / "store", sha, 4096, 1, 2, {}) as writer:
        for i in range(4):
            text = ESSAY.replace("about", f"about {'abcd'[i]}")[: 9000 + 100 * i]
            writer.add([1, *encode(text, add_special_tokens=False), 2])
    with StoreWriter(folder / "foreign", "f" * 64, 4096, 1, 2, {}) as writer:
        writer.add([1] + [5] * 900 + [2])
    write_material(folder / "data")
    return folder


def compose(made, out, *more):
    arguments = [
        f"model={made / 'model'}", f"out={out}", f"held_out={made / 'store'}",
        f"ruler.data={made / 'data'}", "device=cpu", "lengths=[600,500]",
        "tasks=[ruler,needle,babi,short,perplexity]", "perplexity.protocols=[whole_window]",
        "ruler.tasks=[niah_single_2,niah_multikey_3,fwe,qa_2]", "ruler.samples=1",
        "needle.depths=[0,1]", "needle.samples=1", "babi.hops=[1,3]", "babi.samples=1",
        "short.samples=4", "short.context_tokens=64", *more,
    ]  # fmt: skip
    return cli.compose(arguments, EvalConfig, "evaluate", "eval_schema")


def test_probes_end_to_end(made, tmp_path):
    cfg = compose(made, tmp_path / "out")
    results, report = run.evaluate(cfg)
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").open()]
    count = {task: sum(line["task"] == task for line in lines) for task in cfg.tasks}
    assert count == {"ruler": 8, "needle": 4, "babi": 4, "short": 4, "perplexity": 0}
    for line in lines:
        if line["task"] in ("ruler", "babi"):
            room = NEW_TOKENS.get(line["kind"], cfg.babi.new_tokens)
            assert 0.8 * line["length"] < line["tokens"] + room <= line["length"]
            assert line["prompt"] if line["index"] == 0 else line["ends"]
    for heading in ("RULER", "Needle map", "Babi-style", "Short contexts", "`whole_window`"):
        assert heading in report
    assert results["tasks"]["ruler"]["settings"]["lengths"] == [500, 600]
    assert "data" in results["tasks"]["ruler"]["settings"]
    again, _ = run.evaluate(cfg)
    assert again["tasks"] == results["tasks"]


def test_one_forward_says_what_decoding_says(made, tmp_path):
    """The needle's two modes, by a random model: each predicted first token is the same."""
    only = ("tasks=[needle]", "needle.samples=2")
    run.evaluate(compose(made, tmp_path / "a", *only))
    run.evaluate(compose(made, tmp_path / "b", *only, "needle.mode=generate"))
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "samples.jsonl").open()] for name in "ab"
    )
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        assert a["predicted"][0] == b["predicted"][0] and a["correct"] == b["correct"]
        assert (a["answer"], a["tokens"]) == (b["answer"], b["tokens"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["held_out={made}/foreign"], "was made with tokenizer ffff"),
        (["held_out=null", "tasks=[short]"], r"tasks=\[short\] needs held_out=DIR"),
        (["held_out=null", "tasks=[needle]"], r"tasks=\[needle\] needs held_out=DIR"),
        (["ruler.data={made}/none"], "none has no "),
        (["lengths=[600,9000]"], "ask for 9000 tokens, but the longest"),
        (["tasks=[ruler]", "lengths=[200]", "ruler.tasks=[niah_single_2]"], "shortest prompt of"),
        (["attention=dca", "attention.name=nosuch", "tasks=[needle]"], "nosuch"),
    ],
)
def test_refusals_are_one_line(made, tmp_path, more, message):
    with pytest.raises(UserError, match=message) as caught:
        arguments = [argument.format(made=made) for argument in more]
        run.evaluate(compose(made, tmp_path / "out", *arguments))
    assert "\n" not in str(caught.value)
