"""Encoder, warm-up, main stage: each feeds the next, and what comes out is a CEPE model."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from longctx.data.store import tokenizer_sha256
from longctx.models.cepe.encoder import load_encoder
from longctx.models.cepe.model import CepeForCausalLM
from tests.helpers.cepe import cepe_arguments, make_decoder
from tests.helpers.entry import Done, run_entry
from tests.helpers.planned import memory
from tests.helpers.tiny import make_store


class Place(NamedTuple):
    path: Path
    decoder: Path
    store: Path

    def run(self, recipe: str, name: str, *more: str) -> Done:
        arguments = cepe_arguments(recipe, self.decoder, self.store, self.path / name, *more)
        return run_entry(arguments, self.path / f"{name}-log")

    def good(self, recipe: str, name: str, *more: str) -> Path:
        done = self.run(recipe, name, *more)
        assert done.code == 0, done.err[-2000:]
        return self.path / name


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]


def saved_names(run_dir: Path) -> set[str]:
    """Parameters in the last checkpoint."""
    names = set()
    last = max((run_dir / "checkpoints").iterdir())
    for file in last.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            names |= {key.rpartition("/")[0] for key in shard.keys()}  # noqa: SIM118
    return names


@pytest.fixture(scope="module")
def place(tmp_path_factory, lab_model):
    path = tmp_path_factory.mktemp("cepe")
    decoder = make_decoder(path / "decoder", lab_model)
    sha = tokenizer_sha256(lab_model)
    return Place(path, decoder, make_store(path / "store", few=True, tokenizer=sha))


@pytest.fixture(scope="module")
def encoder(place):
    return place.good("cepe_mlm", "mlm", "train.max_steps=20") / "hf"


@pytest.fixture(scope="module")
def warm(place, encoder):
    more = ("train.max_steps=10", f"encoder.path='{encoder}'", "train.eval_every=5")
    return place.good("cepe_warmup", "warmup", *more) / "hf"


def test_the_encoder_learns_and_is_exported(place, encoder):
    found = metrics(place.path / "mlm")
    assert found[-1]["loss"] < found[0]["loss"] - 0.5
    assert [m["tokens"] for m in found[:2]] == [8 * 16, 2 * 8 * 16]
    model = load_encoder(encoder)
    assert model.mask_token_id == 64 and (encoder / "tokenizer.json").is_file()


def test_the_warm_up_trains_what_was_added(place, warm):
    found = metrics(place.path / "warmup")
    assert found[-1]["tokens"] == 10 * 8 * 16  # the encoder's are the same tokens
    assert "eval_loss" in found[-1] and found[-1]["loss"] < found[0]["loss"]
    assert found[0]["mfu"] > 0
    names = saved_names(place.path / "warmup")
    assert names and all(".cross_attn." in name or name.startswith("encoder.") for name in names)
    model = CepeForCausalLM.from_pretrained(warm)
    for name, weight in load_file(place.decoder / "model.safetensors").items():
        assert torch.equal(model.get_parameter(name), weight), name
    assert names == set(model.added_parameters())
    assert (warm / "tokenizer.json").is_file()


def test_the_main_stage_resumes_as_if_never_interrupted(place, warm):
    start = (f"cepe.start='{warm}'", "contexts.mask=0.3")
    whole = place.good("cepe", "whole", *start, "train.max_steps=6")
    for steps in (3, 6):
        broken = place.good("cepe", "broken", *start, f"train.max_steps={steps}")
    keep = ("step", "tokens", "loss", "lr", "grad_norm")
    curves = [[[m[k] for k in keep] for m in metrics(d)] for d in (whole, broken)]
    assert len(curves[0]) == 6 and curves[0] == curves[1]
    assert curves[0][0][1] == 8 * (16 + 3 * 8)
    last = [d / "checkpoints" / "step_00000006" for d in (whole, broken)]
    files = [{p.name: p.read_bytes() for p in d.glob("*.safetensors")} for d in last]
    assert files[0] and files[0] == files[1]
    from_checkpoint = place.good("cepe", "next", f"cepe.start='{last[0]}'", "train.max_steps=1")
    from_export = place.good("cepe", "next2", f"cepe.start='{whole / 'hf'}'", "train.max_steps=1")
    assert metrics(from_checkpoint)[0]["loss"] == metrics(from_export)[0]["loss"]


def test_a_frozen_encoder_is_neither_trained_nor_saved(place, encoder):
    more = (f"encoder.path='{encoder}'", "cepe.train_encoder=false", "cepe.layers=1")
    run_dir = place.good("cepe", "frozen", *more)
    assert {name.split(".cross_attn.")[0] for name in saved_names(run_dir)} == {"model.layers.1"}
    model = CepeForCausalLM.from_pretrained(run_dir / "hf")
    for name, weight in load_encoder(encoder).encoder.named_parameters():
        assert torch.equal(model.encoder.get_parameter(name), weight)


def test_another_decoder_is_refused_on_resume(place, lab_model, tmp_path):
    mine = Place(tmp_path, make_decoder(tmp_path / "decoder", lab_model), place.store)
    mine.good("cepe", "run", "train.max_steps=1")
    make_decoder(tmp_path / "decoder", lab_model, seed=1)
    done = mine.run("cepe", "run", "train.max_steps=2")
    assert done.error == (
        f"{tmp_path}/run/checkpoints/step_00000001 was trained beside other frozen weights or "
        f"rotary frequencies than those of {tmp_path}/decoder"
    )


@pytest.mark.parametrize("recipe", ["cepe", "cepe_warmup"])
def test_another_tokenizer_is_refused(place, encoder, recipe, tmp_path):
    for file in encoder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_text("{}")
    done = place.run(recipe, f"{recipe}-refused", f"encoder.path='{tmp_path}'")
    assert done.error.startswith(f"{tmp_path} was trained with tokenizer ")
    assert not (place.path / f"{recipe}-refused").exists()


def test_the_plan_of_seven_billion_parameters(tmp_path):
    arguments = ["recipe=cepe", "model=llama2_7b", "dry_run=true", "data.store=[nowhere]"]
    done = run_entry(arguments, tmp_path / "log")
    assert done.code == 0
    assert "x 20,000 steps = 20.97B tokens" in done.out
    assert "in all 10,485,760,000 and 10,485,760,000" in done.out
    assert (
        "added: 32 cross-attention layers of 41,947,136 parameters and an encoder of 435,472,384: "
        "1,777,780,736 to 6,738,415,616, 8,516,196,352 in all"
    ) in done.out
    # bf16 weights; bf16 gradients and 12 bytes of Adam for what trains alone
    found = {name: max(cells) for name, cells in memory(done).items()}
    for name, expected in (
        ("weights", 2 * 8_516_196_352),
        ("gradients", 2 * 1_777_780_736),
        ("fp32 weights", 4 * 1_777_780_736),
        ("Adam moments", 8 * 1_777_780_736),
    ):
        assert abs(found[name] - expected / 2**30) < 0.02, (name, found[name])


@pytest.mark.parametrize(
    ("recipe", "steps", "rows", "seq_len", "lr", "warm_up"),
    [
        ("cepe_mlm", 100_000, 2048, 512, 1e-3, 4000),
        ("cepe_warmup", 4000, 128, 256, 5e-4, 160),
        ("cepe", 20_000, 128, 4096, 3e-4, 800),
    ],
)
def test_as_in_the_paper(recipe, steps, rows, seq_len, lr, warm_up):
    """2402.16617 and its published configurations, for Llama-2-7B."""
    from longctx import cli
    from longctx.config import RunConfig

    given = [f"recipe={recipe}", "model=llama2_7b", "data.store=[x]"]
    run = cli.compose(given, RunConfig, "train", "run_schema")
    assert (run.train.max_steps, run.train.batch_rows, run.data.seq_len) == (steps, rows, seq_len)
    optim = run.optim
    assert (optim.lr, optim.warmup_steps, optim.schedule) == (lr, warm_up, "cosine")
    assert (optim.betas, optim.eps, optim.weight_decay, optim.clip) == ([0.9, 0.999], 1e-8, 0, 1)
    assert (optim.warmup_from, optim.final_fraction) == (0, 0)
    assert run.train.dtype == "bf16" and run.parallel.zero_stage >= 1
    shape = (run.contexts.count, run.contexts.size, run.contexts.repeat)
    assert shape == {"cepe_mlm": (0, 0, False), "cepe_warmup": (4, 64, True)}.get(
        recipe, (16, 256, False)
    )
    if recipe == "cepe":
        assert (run.contexts.documents, run.contexts.stream, run.contexts.mask) == (2, 1, 0)
    assert run.data.mask_rate == (0.3 if recipe == "cepe_mlm" else None)
    assert (run.cepe.init, run.cepe.train_encoder, run.cepe.layers) == ("zero", True, None)
