"""Any ZeRO stage, number of processes and accumulation trains as one plain process does.

The reference is a bare torch loop over whole batches: no DeepSpeed, no chunks, no ranks. Rows hold
padding and document borders, so ranks score unequal numbers of tokens (asserted below).
"""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from longctx.batch import IGNORE
from longctx.parallel import mesh
from longctx.train.optim import adamw, learning_rate
from longctx.train.trainer import Trainer
from longctx.recipes.causal_lm import RECIPE
from tests.helpers.spawn import spawn
from tests.helpers.tiny import make_store, tiny_run

STEPS = 20
CASES = [(stage, accumulation) for stage in (0, 1, 2, 3) for accumulation in (1, 4)]
# fp32, 20 steps of a chaotic system: rounding grows to a few 1e-7, an error in a factor to 1e-2.
TOLERANCE = 1e-5


def plain_run(store: Path, run_dir: Path, tied: bool) -> dict:
    """Losses, gradient norms and final weights of a bare torch loop."""
    run = tiny_run(store, run_dir, "train.micro_batch_rows=8", tied=tied)
    model, data = RECIPE.build_model(run), RECIPE.build_data(run)
    trainable = RECIPE.trainable(model)
    optimizer = adamw(trainable.values(), run.optim)
    losses, norms = [], []
    for step in range(STEPS):
        (batch,) = data.train.step(step, 0, 1)
        logits = model(input_ids=batch.tokens, position_ids=batch.positions).logits
        loss = cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trainable.values(), run.optim.clip)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, run.optim)
        optimizer.step()
        losses.append(loss.item())
    weights = {n: p.detach() for n, p in trainable.items()}
    return {"losses": losses, "norms": norms, "weights": weights}


def train_all(store: Path, out: Path, world: int, tied: bool) -> None:
    """On each rank: every case after another; rank 0 writes what it saw."""
    ranks = mesh.start()
    for stage, accumulation in CASES:
        name = f"zero{stage}-{accumulation}"
        run = tiny_run(
            store,
            out / name,
            f"parallel.zero_stage={stage}",
            f"train.micro_batch_rows={8 // world // accumulation}",
            tied=tied,
        )
        trainer = Trainer(run, RECIPE, ranks)
        uneven = {
            r: sum(b.scored for b in trainer.data.train.step(0, r, world)) for r in range(world)
        }
        trainer.fit()
        weights = {n: v["weight"] for n, v in trainer.engine.state()}
        if ranks.main:
            torch.save(weights, out / f"{name}.pt")
            (out / f"{name}.json").write_text(json.dumps(list(uneven.values())))
        trainer.engine.close()
        ranks.barrier()


@pytest.mark.dist
@pytest.mark.parametrize(("world", "tied"), [(1, False), (2, True)])
def test_every_topology_equals_one_plain_process(tmp_path, world, tied):
    store = make_store(tmp_path / "store")
    expected = plain_run(store, tmp_path / "plain", tied)
    spawn(train_all, world, store, tmp_path, world, tied)
    for stage, accumulation in CASES:
        name = f"zero{stage}-{accumulation}"
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line) for line in lines]
        for key, values in (("loss", expected["losses"]), ("grad_norm", expected["norms"])):
            found = torch.tensor([m[key] for m in metrics])
            assert torch.allclose(found, torch.tensor(values), rtol=TOLERANCE, atol=0), (name, key)
        weights = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        for parameter, value in expected["weights"].items():
            # Adam divides by tiny second moments, so weights drift more than the loss does.
            assert torch.allclose(weights[parameter], value, rtol=1e-3, atol=1e-4), name
        scored = json.loads((tmp_path / f"{name}.json").read_text())
        assert len(scored) == world and len(set(scored)) == world
