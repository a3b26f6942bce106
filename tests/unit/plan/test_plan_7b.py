"""Full-size recipes without weights: configuration, batch, tokens of the papers, plan, verdict."""

import sys

import pytest

from longctx import cli
from longctx.config import RunConfig
from longctx.parallel.deepspeed_config import deepspeed_config
from longctx.plan import describe
from longctx.plan.__main__ import main as command
from longctx.plan.budget import Planner
from longctx.plan.machine import Machine
from longctx.recipe import find_recipe

pytestmark = pytest.mark.long

# recipe, model, ranks, tokens of the whole run in 10^9: of rows, with their contexts
PAPERS = [
    ("pi", "llama2_7b", 8, 0.524288),  # 1,000 steps x 64 rows x 8,192 (2306.15595)
    ("pi_32k", "llama2_7b", 8, 4.194304),
    ("direct_ft", "llama2_7b", 8, 5.24288),  # 10,000 steps
    ("longgen", "llama2_7b", 8, 5.0),  # 2410.01485
    ("longgen", "llama2_70b", 32, 5.0),
    ("cepe", "llama2_7b", 8, 20.97),  # 2402.16617
    ("cepe_warmup", "llama2_7b", 8, 0.131),
    ("cepe_mlm", "llama2_7b", 8, 104.8576),  # 100,000 steps x 2,048 rows x 512
    ("ceped", "llama2_7b_chat", 8, 10.5),
    ("dca_ft", "llama2_7b", 8, 0.419),  # 1,600 steps x 16 rows x 16,384 (2402.17463)
]


def full_size(*arguments):
    return cli.compose(list(arguments), RunConfig, "train", "run_schema")


@pytest.mark.parametrize(("recipe", "model", "ranks", "billions"), PAPERS)
def test_tokens_and_the_derived_configuration(recipe, model, ranks, billions):
    run = full_size(f"recipe={recipe}", f"model={model}")
    total = run.train.max_steps * run.train.batch_rows * run.row_tokens / 1e9
    assert total == pytest.approx(billions, rel=2e-3)
    derived = deepspeed_config(run, ranks, gpu=True)
    rows = derived["train_micro_batch_size_per_gpu"] * derived["gradient_accumulation_steps"]
    assert rows * ranks == run.train.batch_rows
    assert derived["bf16"] == {"enabled": True}
    assert derived["zero_optimization"]["stage"] == run.parallel.zero_stage
    assert derived["gradient_clipping"] == 1.0
    assert f"= {round(total * 1e9 / run.train.max_steps):,} tokens per step" in (
        describe.batch_arithmetic(run, ranks)
    )


def budget_of(machine, *arguments):
    run = full_size(*arguments)
    return Planner(find_recipe(run.builder)).budget(run, machine)


def test_longgen_7b_at_128k_by_hand():
    found = budget_of(Machine(gpus=8), "recipe=longgen", "model=llama2_7b")
    parts = found.moments["decoder backward"]
    parameters = 6_738_415_616
    assert found.sizes.parameters == found.sizes.trained == parameters
    assert parts["weights"] == 2 * parameters / 8
    assert parts["fp32 weights"] == 4 * parameters / 8
    assert parts["Adam moments"] == 8 * parameters / 8
    start = {"weights": 2 * parameters / 8, "gathered weights": 2 * 32_000 * 4096}
    assert found.moments["start"] == {**start, "fp32 weights": 4 * parameters / 8}
    inputs = 32 * 131_072 * 4096 * 2  # the inputs of 32 layers, bf16
    assert inputs <= parts["decoder"] <= 1.01 * inputs
    # one layer again: four tensors of the FFN's width and their gradients, at the least
    ffn = 131_072 * 11_008 * 2
    assert 6 * ffn <= parts["layer at hand"] <= 14 * ffn
    tiled = budget_of(
        Machine(gpus=8), "recipe=longgen", "model=llama2_7b", "parallel.mlp_tile=16384",
        "parallel.offload_checkpoints=true",
    )  # fmt: skip
    less = tiled.moments["decoder backward"]
    assert less["layer at hand"] < 0.8 * parts["layer at hand"]
    assert less.get("decoder", 0) < 0.01 * inputs
    assert tiled.host["checkpointed layer inputs"] == inputs
    shared = budget_of(Machine(gpus=8), "recipe=longgen", "model=llama2_7b", "parallel.sp=4")
    assert shared.moments["decoder backward"]["decoder"] == pytest.approx(
        parts["decoder"] / 4, rel=0.01
    )


def test_cepe_trains_a_small_part_beside_a_frozen_decoder():
    found = budget_of(Machine(gpus=8), "recipe=cepe", "model=llama2_7b")
    parts = found.moments["decoder backward"]
    assert found.sizes.trained < 0.3 * found.sizes.parameters
    assert parts["weights"] == 2 * found.sizes.parameters
    assert parts["Adam moments"] == found.sizes.trained
    assert parts["encoder"] > 0
    chat = budget_of(Machine(gpus=8), "recipe=ceped", "model=llama2_7b_chat")
    assert chat.moments["forward"]["teacher"] > 0
    assert "teacher" in chat.time.flops


def test_the_command_says_what_makes_it_fit(capsys, monkeypatch):
    asked = ["recipe=pi", "model=llama2_7b", "seq_len=16384", "gpus=2", "gpu_memory=80"]
    monkeypatch.setattr(sys, "argv", ["plan", *asked])
    command()
    said = capsys.readouterr().out
    assert "16,384 tokens per rank x 2 ranks" in said
    assert "DOES NOT FIT: " in said
    change = said.strip().rpartition("smallest change that makes it fit: ")[2]
    assert change
    monkeypatch.setattr(sys, "argv", ["plan", *asked, *change.split()])
    command()
    assert "\nFITS: " in capsys.readouterr().out
