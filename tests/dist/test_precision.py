"""bf16 follows fp32, and rotary frequencies stay fp32 inside the engine."""

import json
from pathlib import Path

import pytest
import torch

from longctx.parallel import mesh
from longctx.train.log import read_metrics
from longctx.train.trainer import Trainer
from longctx.recipes.causal_lm import RECIPE
from tests.helpers.spawn import spawn
from tests.helpers.tiny import make_store, tiny_run

CASES = [("fp32", 1), ("bf16", 1), ("bf16", 2), ("bf16", 3)]


def train_all(store: Path, out: Path) -> None:
    ranks = mesh.start()
    for dtype, stage in CASES:
        name = f"{dtype}-{stage}"
        more = (f"train.dtype={dtype}", f"parallel.zero_stage={stage}", "train.micro_batch_rows=4")
        more += ("parallel.activation_checkpointing=true", "train.max_steps=12")
        trainer = Trainer(tiny_run(store, out / name, *more), RECIPE, ranks)
        trainer.fit()
        module = trainer.engine.engine.module
        kinds = {
            "weights": {str(p.dtype) for p in module.parameters()},
            "frequencies": {str(b.dtype) for n, b in module.named_buffers() if "inv_freq" in n},
        }
        if ranks.main:
            (out / f"{name}.json").write_text(json.dumps({k: sorted(v) for k, v in kinds.items()}))
        trainer.engine.close()


@pytest.mark.dist
def test_bf16_follows_fp32(tmp_path):
    store = make_store(tmp_path / "store", few=True)
    spawn(train_all, 1, store, tmp_path)
    expected = torch.tensor([m["loss"] for m in read_metrics(tmp_path / "fp32-1")])
    assert float(expected[-1]) < float(expected[0]) - 0.5
    for dtype, stage in CASES[1:]:
        name = f"{dtype}-{stage}"
        losses = torch.tensor([m["loss"] for m in read_metrics(tmp_path / name)])
        # bf16 keeps 8 bits, a relative 4e-3 a number; the loss falls by a fifth, so that a lost or
        # doubled update is far outside.
        assert torch.allclose(losses, expected, rtol=1e-2, atol=0), name
        kinds = json.loads((tmp_path / f"{name}.json").read_text())
        assert kinds == {"weights": ["torch.bfloat16"], "frequencies": ["torch.float32"]}
