"""Training steps and decoders on several ranks against one plain process; run on every rank."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from longctx.batch import Batch
from longctx.config import RunConfig
from longctx.parallel.mesh import shard
from longctx.train.sequence_parallel import share_rows
from longctx.train.trainer import Trainer
from tests.helpers.methods import LAYERS
from tests.helpers.networks import network, tokens

LENGTH = 32  # beyond the window of the decoders, 12
POSITIONS = torch.tensor([[p for n in row for p in range(n)] for row in ((13, 1, 18), (32,))])


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def of_decoder(model, batch: Batch, weight: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Last states, and the gradient of their weighted sum for every parameter."""
    model.zero_grad()
    decoder = model.get_decoder()
    states = decoder(
        input_ids=batch.tokens, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    (states * weight).sum().backward()
    return states.detach(), {n: p.grad.clone() for n, p in decoder.named_parameters()}


def compare_decoder(ranks, attention, rope, key_heads, checkpointing=False) -> dict[str, float]:
    """Errors of a decoder whose rows are spread over the ranks, in float64."""
    more = {"num_key_value_heads": key_heads, "num_hidden_layers": LAYERS}
    model = network("llama", attention, rope, **more)
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    whole = Batch(tokens(2, LENGTH), tokens(2, LENGTH), POSITIONS)
    weight = torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(1)).double()
    states, grads = of_decoder(model, whole, weight)
    share_rows(model, ranks)
    part = LENGTH // ranks.sp_size
    own = slice(ranks.sp_rank * part, ranks.sp_rank * part + part)
    found, ours = of_decoder(model, shard(whole, ranks), weight[:, own])
    errors = {"states": error(found, states[:, own])}
    total = torch.cat([grad.flatten() for grad in ours.values()])
    dist.all_reduce(total, group=ranks.sp_group)
    parts = total.split([grad.numel() for grad in ours.values()])
    for name, part in zip(ours, parts, strict=True):
        errors[name] = error(part, grads[name].flatten())
    return errors


def write(place: Path, name: str, ranks, found: dict[str, float]) -> None:
    """One file a case and rank."""
    (place / f"{name}.{ranks.rank}.json").write_text(json.dumps(found))


def worst(place: Path, name: str) -> float:
    """The largest error of a case on any rank."""
    files = sorted(place.glob(f"{name}.[0-9]*.json"))
    assert files, name
    return max(max(json.loads(f.read_text()).values()) for f in files)


def plain_step(run: RunConfig, recipe) -> dict[str, torch.Tensor]:
    """Loss and gradients of the first step in one process: no engine, no ranks, whole batches."""
    model, data = recipe.build_model(run), recipe.build_data(run)
    model.train()
    trainable = recipe.trainable(model)
    parts = [recipe.loss(run, model, batch) for batch in data.train.step(0, 0, 1)]
    loss = sum(part[0] for part in parts) / sum(part[1] for part in parts)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in trainable.items()}}


def sharded_step(run: RunConfig, recipe, ranks, factor: int = 1) -> dict[str, torch.Tensor]:
    """The same by the trainer, up to the update; `factor` is a fault to plant."""
    trainer = Trainer(run, recipe, ranks)
    trainer.engine.ranks *= factor
    found: dict[str, torch.Tensor] = {}
    step = trainer.engine.step

    def keep(*given):
        for name, parameter in trainer.engine.trainable.items():
            found[name] = safe_get_full_grad(parameter).detach().clone()
        return step(*given)

    trainer.engine.step = keep
    loss = trainer.train_step(0).loss
    trainer.rows.close()
    trainer.engine.close()
    return {"loss": torch.tensor(loss), **found}
