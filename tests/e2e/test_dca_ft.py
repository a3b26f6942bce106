"""Fine-tuning under Dual Chunk Attention: the paper's numbers, and a loss that falls."""

import json

import pytest
from transformers import AutoModelForCausalLM

from longctx import cli
from longctx.config import RunConfig
from longctx.models.load import load_model
from tests.helpers.entry import run_entry
from tests.helpers.tiny import make_store, tiny_arguments

TINY = [
    "recipe=dca_ft",
    "model=lab_scratch",
    "data.seq_len=96",  # three windows of 32
    "optim.warmup_steps=2",
    "train.dtype=fp32",
]


def test_as_in_the_paper():
    """2402.17463 section 4.1 and the command of its repository, for Llama-2-7B."""
    given = ["recipe=dca_ft", "model=llama2_7b"]
    run = cli.compose(given, RunConfig, "train", "run_schema")
    assert run.data.seq_len == 16_384 and run.train.batch_rows == 16
    assert (run.optim.lr, run.optim.schedule, run.optim.weight_decay) == (2e-5, "cosine", 0)
    assert run.optim.warmup_steps == 0.03 * run.train.max_steps == 48
    assert run.attention["name"] == "dca" and run.rope.name == "none"
    assert run.parallel.activation_checkpointing and run.train.dtype == "bf16"


def test_the_loss_falls(tmp_path):
    store = make_store(tmp_path / "store", few=True)
    curves = []
    for more in ([], ["parallel=zero0"], ["parallel.activation_checkpointing=false"]):
        run_dir = tmp_path / f"run{len(curves)}"
        arguments = tiny_arguments(store, run_dir, *TINY, *more)
        arguments.remove("recipe=pretrain")
        done = run_entry(arguments, tmp_path / "log")
        assert done.code == 0, done.err[-2000:]
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line)["loss"] for line in lines])
    assert len(curves[0]) == 20
    assert curves[0][-1] < curves[0][0] - 0.5
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)
    exported = load_model(tmp_path / "run0" / "hf")
    numbers = {"chunk_len": 24, "local_window": 8, "max_positions": 32}
    assert exported.config.longctx_attention.items() >= numbers.items()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run0" / "hf")  # longctx is imported
    assert type(plain) is type(exported) and (tmp_path / "run0/hf/modeling_longctx.py").is_file()
