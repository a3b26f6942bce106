"""One optimizer step in every topology, against one plain process: what the certificate measures.

A gradient is read off Adam's first moment after the first step, (1 - beta1) times it, as the
trainer itself saves it: so what is compared is what trains, on every ZeRO stage alike. The plain
process has no engine, no ranks, no shards and no accumulation. About a second a cell.
"""

import os
import socket
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import Tensor

from longctx.config import RunConfig
from longctx.errors import UserError
from longctx.parallel import mesh
from longctx.parity.shrink import ROWS
from longctx.recipe import Recipe, find_recipe
from longctx.train.optim import freeze_all_but
from longctx.train.trainer import Trainer

# A gradient below this share of the largest one is measured against that share: k's bias has none,
# in exact arithmetic, and rounding is no error of the topology.
FLOOR = 1e-4
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "packed": {"data": {"packing": "concat", "mask_documents": True}},
    "padded": {"data": {"packing": "best_fit", "mask_documents": True}},
    "windows": {"data": {"packing": "concat", "mask_documents": False}},
    "masked contexts": {
        "data": {"packing": "concat", "mask_documents": False},
        "contexts": {"mask": 0.5, "mask_whole": 0.5},
    },
}


@dataclass(frozen=True)
class Cell:
    """One topology.

    Args:
        kind: of rows, a key of KINDS.
        dp: data-parallel size.
        sp: ranks that share a row.
        zero: ZeRO stage.
        accumulation: micro-batches a step.
    """

    kind: str
    dp: int
    sp: int
    zero: int
    accumulation: int

    @property
    def world(self) -> int:
        """Processes."""
        return self.dp * self.sp

    def run(self, tiny: RunConfig) -> RunConfig:
        """The tiny run in this topology."""
        micro = ROWS // (self.dp * self.accumulation)
        changed = of_kind(tiny, self.kind)
        return replace(
            changed,
            parallel=replace(changed.parallel, zero_stage=self.zero, sp=self.sp),
            train=replace(changed.train, micro_batch_rows=micro),
        )


@dataclass(frozen=True)
class Error:
    """Largest relative errors of a cell against the plain process.

    Args:
        loss: of the loss.
        gradient: of any parameter's gradient.
        parameter: which one.
    """

    loss: float
    gradient: float
    parameter: str


def of_kind(run: RunConfig, kind: str) -> RunConfig:
    """The run with rows of that kind."""
    change = KINDS[kind]
    contexts = replace(run.contexts, **change.get("contexts", {}))
    return replace(run, data=replace(run.data, **change["data"]), contexts=contexts)


def kinds_of(run: RunConfig, recipe: Recipe) -> list[str]:
    """The kinds of rows that the recipe takes.

    Raises:
        UserError: if it takes none: what it says of the first.
    """
    taken, refusals = [], []
    for kind, change in KINDS.items():
        if "contexts" in change and not run.contexts.count:
            continue
        changed = of_kind(run, kind)
        try:
            recipe.sketch(changed)
            recipe.build_data(changed)
        except UserError as error:
            refusals.append(error)
        else:
            taken.append(kind)
    if not taken:
        raise refusals[-1]
    return taken if taken[0] == "windows" else [k for k in taken if k != "windows"]


def recipe_of(run: RunConfig) -> Recipe:
    """The recipe that a run names."""
    found: Recipe = find_recipe(run.builder)
    return found


def plain(run: RunConfig, recipe: Recipe) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the first step in one process, with nothing but torch."""
    whole = replace(run, train=replace(run.train, micro_batch_rows=ROWS))
    model, data = recipe.build_model(whole), recipe.build_data(whole)
    trainable = recipe.trainable(model)
    freeze_all_but(model, trainable)
    (batch,) = data.train.step(0, 0, 1)
    total, _ = recipe.loss(whole, model, batch)
    loss = total / batch.scored
    loss.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trainable.items()}
    return float(loss.detach()), gradients


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of a gradient, and whose it is."""
    least = FLOOR * max(float(g.abs().max()) for g in expected.values())
    errors = {
        name: float((found[name] - g).abs().max()) / max(float(g.abs().max()), least)
        for name, g in expected.items()
    }
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return errors[worst], worst


def measure(cell: Cell, tiny: RunConfig, recipe: Recipe, expected: Path) -> Error | None:
    """This rank's part of one cell; rank 0 gets the errors.

    Args:
        cell: the topology.
        tiny: the run, shrunk.
        recipe: its recipe.
        expected: what `plain` gave, as a file.
    """
    ranks = mesh.start(cell.sp)
    trainer = Trainer(cell.run(tiny), recipe, ranks)
    result = trainer.train_step(0)
    trainer.rows.close()
    keep = 1 - tiny.optim.betas[0]
    gradients = {name: values["exp_avg"] / keep for name, values in trainer.engine.state()}
    trainer.engine.close()
    ranks.barrier()
    if not ranks.main:
        return None
    stored = load_file(expected)
    loss = float(stored.pop("loss"))
    return Error(abs(result.loss / loss - 1), *compare(gradients, stored))


def rank() -> int:
    """This process among those of `on_ranks`."""
    return int(os.environ["RANK"])


def _rank(number: int, world: int, port: int, work: Callable[[], None]) -> None:
    os.environ.update(
        RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    # Torch renames collectives that this DeepSpeed still calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    work()


def on_ranks(world: int, work: Callable[[], None]) -> None:
    """Runs a picklable `work()` on so many new processes of this machine, on CPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    before = dict(os.environ)
    os.environ.update(NO_GPU)  # before they start: unpickling `work` imports deepspeed
    try:
        torch.multiprocessing.spawn(_rank, (world, port, work), world)
    finally:
        for name in NO_GPU:
            del os.environ[name]
            if name in before:
                os.environ[name] = before[name]


def keep_plain(run: RunConfig, recipe: Recipe, kinds: list[str], place: Path) -> None:
    """Writes `place/KIND.safetensors` with the plain process's loss and gradients."""
    for kind in kinds:
        loss, gradients = plain(of_kind(run, kind), recipe)
        # Float64: a float32 would round the loss to 1e-7 of itself before it is compared.
        kept = {"loss": torch.tensor(loss, dtype=torch.float64), **gradients}
        save_file({n: g.contiguous() for n, g in kept.items()}, place / f"{kind}.safetensors")


def cells(kinds: list[str], short: bool) -> Iterator[Cell]:
    """All topologies, in the order of the table; the short form takes a few of them."""
    for dp, sp in ((1, 1), (2, 1), (1, 2), (2, 2)):
        for zero in (0, 1, 2, 3):
            for accumulation in (1, 4):
                for kind in kinds:
                    # Two processes, the two stages that differ most, passes that are summed.
                    few = dp * sp == 2 and zero in (1, 3) and accumulation == 4
                    if few or not short:
                        yield Cell(kind, dp, sp, zero, accumulation)
