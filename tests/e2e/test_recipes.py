"""Every recipe composes and plans itself, without a weight; the papers' numbers stand in it."""

import os

import pytest
import yaml

from tests.helpers.entry import Done, run_entry
from tests.helpers.planned import memory
from tests.helpers.process import ROOT
from tests.helpers.sized import given_sizes

RECIPES = sorted(p.stem for p in (ROOT / "conf" / "recipe").glob("*.yaml"))
MODELS = ["llama2_7b", "lab_scratch"]
if (ROOT / "assets" / "lab-llama" / "config.json").exists():
    MODELS.append("lab")
LLAMA2_7B = 6_738_415_616


def on_eight_ranks() -> None:
    os.environ["WORLD_SIZE"] = "8"


def parts(done: Done) -> tuple[dict, dict[str, str]]:
    """The resolved run, and the plan's lines by what stands before their colon."""
    assert done.code == 0 and done.err == "", done
    text, mark, plan = done.out.partition("\nbatch: ")
    lines = (mark.strip() + " " + plan).strip().splitlines()
    return yaml.safe_load(text), dict(line.split(": ", 1) for line in lines if ": " in line)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_dry_run(recipe, model, tmp_path):
    run_dir = tmp_path / "run"
    arguments = [f"recipe={recipe}", f"model={model}", "dry_run=true", f"run_dir='{run_dir}'"]
    done = run_entry(arguments, tmp_path / "log")
    if done.code:  # numbers for another size of model are not taken unless they are given
        done = run_entry([*arguments, *given_sizes(done.error)], tmp_path / "log")
    run, plan = parts(done)
    assert (run["name"], run["model"]["name"]) == (recipe, model)
    train, contexts = run["train"], run["contexts"]
    read = 0 if contexts["repeat"] else contexts["count"] * contexts["size"]
    row = run["data"]["seq_len"] + read
    accumulation = train["batch_rows"] // train["micro_batch_rows"]
    assert plan["batch"].startswith(
        f"{train['micro_batch_rows'] * row:,} tokens per rank x 1 ranks x {accumulation} "
        f"accumulation = {train['batch_rows'] * row:,} tokens per step; "
    )
    table = memory(done)
    sums = table.pop("sum")
    columns = zip(*table.values(), strict=True)
    rounding = 0.01 * len(table)
    assert all(abs(sum(c) - total) < rounding for c, total in zip(columns, sums, strict=True))
    peak = float(plan["memory per rank, peak"].removesuffix(" GiB"))
    assert abs(peak - max(sums)) < 0.01
    if model == "llama2_7b" and run["encoder"]["name"] == "none":
        assert f"parameters {LLAMA2_7B}," in plan["model"]
    assert not run_dir.exists()


def test_position_interpolation_as_in_the_paper(tmp_path):
    """2306.15595 section 3.1, for Llama-2-7B."""
    arguments = ["recipe=pi", "model=llama2_7b", "dry_run=true"]
    run, plan = parts(run_entry(arguments, tmp_path / "log"))
    assert run["optim"] == {
        "lr": 2e-5,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip": 1.0,
        "schedule": "constant",
        "warmup_steps": 20,
        "warmup_from": 0.1,
        "final_fraction": 0.0,
    }
    assert run["train"]["max_steps"] == 1000
    assert run["data"]["packing"] == "concat" and run["data"]["mask_documents"] is False
    assert run["rope"]["name"] == "pi" and run["adapter"]["name"] == "none"
    assert plan["batch"] == (
        "8,192 tokens per rank x 1 ranks x 64 accumulation = 524,288 tokens per step; "
        "x 1,000 steps = 0.5243B tokens"
    )
    assert "window 8192, rope_type linear, rope_factor 2, rope_base 10000" in plan["model"]


def test_position_interpolation_to_32k(tmp_path):
    arguments = ["recipe=pi_32k", "model=llama2_7b", "parallel=zero3", "dry_run=true"]
    done = run_entry(arguments, tmp_path / "log", on_eight_ranks)
    _, plan = parts(done)
    assert plan["batch"] == (
        "32,768 tokens per rank x 8 ranks x 16 accumulation = 4,194,304 tokens per step; "
        "x 1,000 steps = 4.194B tokens"
    )
    assert "window 32768, rope_type linear, rope_factor 8, rope_base 10000" in plan["model"]
    # bf16 weights and gradients, 12 bytes of Adam: 2, 2 and 12 x 6,738,415,616 / 8 ranks
    started = {name: max(cells[1:]) for name, cells in memory(done).items()}
    assert started["weights"] == started["gradients"] == 1.57
    # of the 12 bytes, 4 are the weights' and 8 the moments'
    assert (started["fp32 weights"], started["Adam moments"]) == (3.14, 6.28)


def test_direct_fine_tuning_is_pi_without_interpolation(tmp_path):
    found = {}
    for recipe in ("pi", "direct_ft"):
        arguments = [f"recipe={recipe}", "model=llama2_7b", "dry_run=true"]
        found[recipe], plan = parts(run_entry(arguments, tmp_path / "log"))
    assert "window 4096, rope_type default, rope_factor 1," in plan["model"]
    pi, direct = found["pi"], found["direct_ft"]
    assert direct["train"].pop("max_steps") == 10_000 and pi["train"].pop("max_steps") == 1000
    assert direct["rope"]["name"] == "none"
    different = {key for key in pi if pi[key] != direct[key]}
    assert different == {"name", "rope", "run_dir"}


def test_the_pretraining_run(tmp_path):
    run, plan = parts(run_entry(["recipe=pretrain", "dry_run=true"], tmp_path / "log"))
    # embedding 4096 x 128, tied; a layer: 4 x 128^2 + 3 x 128 x 384 + 2 x 128; the last norm 128
    assert "parameters 1377408," in plan["model"]
    assert plan["batch"] == (
        "2,048 tokens per rank x 1 ranks x 2 accumulation = 4,096 tokens per step; "
        "x 3,600 steps = 0.01475B tokens"
    )
    assert run["model"]["architecture"]["max_position_embeddings"] == 256
