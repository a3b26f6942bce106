"""Distillation under every ZeRO stage, with two processes, trains as one plain process does.

The teacher's pass and its logits run without gradients in the midst of a sharded forward, so each
stage has to gather the frozen weights for them; the trained weights must come out the same.
"""

import json
from pathlib import Path

import pytest
import torch

from longctx.data.store import tokenizer_sha256
from longctx.parallel import mesh
from longctx.train.optim import adamw, learning_rate
from longctx.train.trainer import Trainer
from longctx.recipes.ceped import RECIPE
from tests.helpers.cepe import cepe_run, make_decoder
from tests.helpers.spawn import spawn
from tests.helpers.tiny import make_store

STEPS = 6
CASES = [(0, 2), (1, 2), (2, 4), (3, 2), (3, 4)]  # ZeRO stage, micro-batch rows
# fp32, chaotic, a few steps of Adam: rounding grows to 1e-6, a wrong factor to 1e-2.
TOLERANCE = 1e-5


def settings(place: Path, run_dir: Path, *more: str):
    given = ("cepe.init=copy", "kl.top_k=5", f"train.max_steps={STEPS}", *more)
    return cepe_run("ceped", place / "decoder", place / "store", run_dir, *given)


def plain_run(place: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of a bare torch loop over whole batches."""
    run = settings(place, place / "plain", "train.micro_batch_rows=8")
    model, data = RECIPE.build_model(run), RECIPE.build_data(run)
    trainable = RECIPE.trainable(model)
    optimizer, losses = adamw(trainable.values(), run.optim), []
    for step in range(STEPS):
        (batch,) = data.train.step(step, 0, 1)
        total, count = RECIPE.loss(run, model, batch)
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(trainable.values(), run.optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, run.optim)
        optimizer.step()
        losses.append(float(total.detach() / count))
    return losses, {n: p.detach() for n, p in trainable.items()}


def train_all(place: Path) -> None:
    """On each rank: every case after another; rank 0 writes what it saw."""
    ranks = mesh.start()
    for stage, rows in CASES:
        name = f"zero{stage}-{rows}"
        given = (f"parallel.zero_stage={stage}", f"train.micro_batch_rows={rows}")
        trainer = Trainer(settings(place, place / name, *given), RECIPE, ranks)
        trainer.fit()
        weights = {n: v["weight"] for n, v in trainer.engine.state()}
        if ranks.main:
            torch.save(weights, place / f"{name}.pt")
        trainer.engine.close()
        ranks.barrier()


@pytest.mark.dist
def test_every_stage_equals_one_plain_process(tmp_path, lab_model):
    make_decoder(tmp_path / "decoder", lab_model)
    make_store(tmp_path / "store", few=True, tokenizer=tokenizer_sha256(lab_model))
    losses, expected = plain_run(tmp_path)
    spawn(train_all, 2, tmp_path)
    for stage, rows in CASES:
        name = f"zero{stage}-{rows}"
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found = torch.tensor([json.loads(line)["loss"] for line in lines])
        assert torch.allclose(found, torch.tensor(losses), rtol=TOLERANCE, atol=0), name
        weights = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert weights.keys() == expected.keys()
        for parameter, value in expected.items():
            assert torch.allclose(weights[parameter], value, rtol=1e-3, atol=1e-4), name
