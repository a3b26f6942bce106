"""CEPE on two ranks with ZeRO 2 trains as one plain process does, its contexts dealt out too.

The reference is a bare torch loop over whole batches. A document's last label is missing, so
ranks score unequal numbers of tokens; some contexts are masked (both asserted below).
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from longctx.batch import IGNORE
from longctx.data.store import StoreWriter, tokenizer_sha256
from longctx.parallel import mesh
from longctx.train.optim import adamw
from longctx.train.trainer import Trainer
from longctx.recipes.cepe import RECIPE
from tests.helpers.cepe import VOCAB, cepe_run, make_decoder
from tests.helpers.spawn import spawn

STEPS = 8
MORE = ("cepe.init=copy", "contexts.mask=0.5", f"train.max_steps={STEPS}", "optim.lr=3e-3")
# fp32: rounding is a few 1e-7 a step, a factor of the number of ranks is far outside.
TOLERANCE = 1e-5


def plain_run(decoder: Path, store: Path, run_dir: Path) -> dict:
    """Losses, gradient norms, first gradients and final weights of a bare torch loop."""
    run = cepe_run("cepe", decoder, store, run_dir, *MORE, "train.micro_batch_rows=8")
    model, data = RECIPE.build_model(run), RECIPE.build_data(run)
    trainable = RECIPE.trainable(model)
    optimizer = adamw(trainable.values(), run.optim)
    found = {"losses": [], "norms": [], "masked": 0.0}
    for step in range(STEPS):
        (batch,) = data.train.step(step, 0, 1)
        logits = model(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            context_ids=batch.contexts,
            context_mask=batch.context_mask,
        ).logits
        loss = cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        found["norms"].append(
            float(torch.nn.utils.clip_grad_norm_(trainable.values(), run.optim.clip))
        )
        optimizer.step()
        found["losses"].append(loss.item())
        found["masked"] += float((~batch.context_mask).float().mean()) / STEPS
    return {**found, "weights": {n: p.detach() for n, p in trainable.items()}}


def train_on_two(decoder: Path, store: Path, out: Path) -> None:
    """On each rank; rank 0 writes what it saw."""
    ranks = mesh.start()
    more = (*MORE, "parallel.zero_stage=2", "parallel.activation_checkpointing=true")
    run = cepe_run("cepe", decoder, store, out / "run", *more, "train.micro_batch_rows=2")
    trainer = Trainer(run, RECIPE, ranks)
    rows = trainer.data.train
    scored = [[sum(b.scored for b in rows.step(n, r, 2)) for r in (0, 1)] for n in range(STEPS)]
    trainer.fit()
    weights = {n: v["weight"] for n, v in trainer.engine.state()}
    if ranks.main:
        whole = {n: p.detach() for n, p in trainer.model.named_parameters()}
        torch.save({"trained": weights, "whole": whole}, out / "weights.pt")
        (out / "scored.json").write_text(json.dumps(scored))
    trainer.engine.close()


@pytest.mark.dist
def test_two_ranks_equal_one_plain_process(tmp_path, lab_model):
    decoder = make_decoder(tmp_path / "decoder", lab_model)
    sha = tokenizer_sha256(lab_model)
    store = tmp_path / "store"
    random = np.random.default_rng(0)
    with StoreWriter(store, sha, VOCAB, 1, 2, {}) as writer:
        for length in [40, 57] * 20:  # the first kind is one window, whose last label is missing
            writer.add([1, *random.integers(4, VOCAB, length - 2), 2])
    expected = plain_run(decoder, store, tmp_path / "plain")
    assert 0.1 < expected["masked"] < 0.5
    spawn(train_on_two, 2, decoder, store, tmp_path)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    for key, values in (("loss", expected["losses"]), ("grad_norm", expected["norms"])):
        found = torch.tensor([m[key] for m in metrics])
        assert torch.allclose(found, torch.tensor(values), rtol=TOLERANCE, atol=0), (key, found)
    saved = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert saved["trained"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        assert torch.allclose(saved["trained"][name], value, rtol=1e-3, atol=1e-4), name
    base = RECIPE.build_model(cepe_run("cepe", decoder, store, tmp_path / "run", *MORE))
    frozen = [name for name, p in base.named_parameters() if not p.requires_grad]
    assert frozen
    for name in frozen:
        assert torch.equal(saved["whole"][name], base.get_parameter(name)), name
    scored = json.loads((tmp_path / "scored.json").read_text())
    assert any(mine != other for mine, other in scored)
