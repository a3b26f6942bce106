"""The one training loop. It knows the recipe contract, and no method by name."""

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longctx.batch import Batch
from longctx.config import RunConfig
from longctx.data.loader import Prefetch
from longctx.errors import UserError
from longctx.parallel.mesh import Mesh, shard
from longctx.parallel.zero import Engine
from longctx.recipe import Data, Recipe, settings_of
from longctx.train import meter
from longctx.train.checkpoint import reader, writer
from longctx.train.checkpoint.background import Saver
from longctx.train.checkpoint.resume import require_same
from longctx.train.log import Log, say
from longctx.train.node_copy import node_copy
from longctx.train.optim import DivergedError, Guard, adamw, freeze_all_but, learning_rate
from longctx.train.probe import Running, Score
from longctx.train.sequence_parallel import share_rows
from longctx.train.signals import Asked, Stopped


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all ranks.

    Args:
        loss: summed loss / scored tokens.
        grad_norm: before clipping.
        lr: learning rate.
        tokens: tokens fed.
        seconds: wall time.
        data_seconds: of it, waiting for data.
        flops: model FLOPs of this rank.
        taken: True if the weights were updated; `Guard` in `optim.py` leaves a bad step out.
    """

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    seconds: float
    data_seconds: float
    flops: float
    taken: bool = True


class Scored(nn.Module):
    """Model and loss as one module, so that one forward call runs both under any ZeRO stage.

    Args:
        model: the recipe's.
        recipe: whose loss it is.
        run: what the loss is told.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, run: RunConfig) -> None:
        super().__init__()
        self.model = model
        self.score: Score = partial(recipe.loss, run)

    def forward(self, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        """(sum, count) of a batch given by its fields."""
        found: tuple[Tensor, Tensor] = self.score(self.model, Batch(**tensors))
        return found


class Trainer:
    """A run, from its configuration to its last checkpoint.

    Args:
        run: the configuration.
        recipe: what to build and score.
        mesh: the ranks.
        announce: called on rank 0 with the model, before an engine may shard it, and the data.
        probe: called on all ranks every `in_loop.every` steps; what it returns is logged.

    Raises:
        UserError: if the data, the batch arithmetic or the checkpoint to resume do not fit.
    """

    def __init__(
        self,
        run: RunConfig,
        recipe: Recipe,
        mesh: Mesh,
        announce: Callable[[nn.Module, Data], None] = lambda model, data: None,
        probe: Callable[[Running], dict[str, float]] | None = None,
    ) -> None:
        settings_of(run, recipe.settings)  # a wrong one is refused before anything is read
        run.train.check_rows(mesh.dp_size)
        self.run, self.mesh = run, mesh
        self.run_dir = Path(run.run_dir)
        self.step_tokens = run.train.batch_rows * run.row_tokens
        self.checkpoints = self.run_dir / "checkpoints"
        resumed = self._find_checkpoint()
        self.data = recipe.build_data(run)
        self.rows = Prefetch(self.data.train, run.data.prefetch, end=run.train.max_steps)
        with node_copy(run, mesh, recipe.reads_weights) as local:
            self.model = recipe.build_model(local)
        trainable = recipe.trainable(self.model)
        freeze_all_but(self.model, trainable)
        self.fingerprint = writer.fingerprint(self.model) | {"data": self.data.train.identity}
        self.counts = meter.counts(self.model)
        share_rows(self.model, mesh)
        weights: dict[str, reader.Read] = {}
        if resumed:
            require_same(resumed, run, self.fingerprint)
            weights = reader.fitting_weights(self.model, resumed)
        if mesh.main:
            announce(self.model, self.data)
        optimizer = adamw(trainable.values(), run.optim)
        scored = Scored(self.model, recipe, run)
        self.engine = Engine(scored, trainable, optimizer, run, mesh, weights)
        self.probe, self.running = probe, Running(self.engine, scored, mesh)
        self.step = resumed.step if resumed else 0
        self.tokens = int(resumed.meta["tokens"]) if resumed else 0
        self.guard = Guard(run.train, **(resumed.meta.get("guard", {}) if resumed else {}))
        self.saver = Saver(self.checkpoints, run.train, mesh, resumed.path if resumed else None)
        if resumed:
            self.engine.restore(self.step - self.guard.skipped, resumed.state())

    def fit(self) -> Path:
        """Trains to `max_steps`, evaluating and saving on the way; the last checkpoint's path.

        Raises:
            Stopped: if a rank was asked to stop; the step has been saved.
            SaveError: if its last checkpoint cannot be written.
        """
        log = self._open_log()
        try:
            with Asked() as asked:
                while self.step < self.run.train.max_steps:
                    self._step_and_save(log)
                    stop, *news = self.mesh.sums(bool(asked), *self.saver.news())
                    self.saver.hear(*news)
                    if stop and not self._due(0):
                        raise Stopped(self.save_last())
        except DivergedError:
            self.saver.finish()
            raise
        finally:
            self.rows.close()
            if log:
                log.close()
        return self.save_last()

    def _step_and_save(self, log: Log | None) -> None:
        """One step with what is due after it."""
        torch.manual_seed(hash((self.run.seed, self.step, self.mesh.rank)) % 2**63)
        result = self.train_step(self.step)
        self.step += 1
        self.tokens += result.tokens
        held_out = self.evaluate() if self._due(self.run.train.eval_every) else None
        more: dict[str, float] = {}
        if self.probe and self._due(self.run.in_loop.every):
            with self.running.questions() as running:
                more = self.probe(running)
        if log:
            log.step(self._metrics(result, held_out) | more)
        if self._due(self.run.train.save_every) and not self._due(0):
            self.saver.save(self.step, self.engine.state(), self._about())

    def train_step(self, step: int) -> StepResult:
        """One optimizer step: the gradient is that of (global sum) / (global count)."""
        begin = time.perf_counter()
        rows = self.rows.step(step, self.mesh.dp_rank, self.mesh.dp_size)
        batches = [shard(batch, self.mesh) for batch in rows]
        data_seconds = time.perf_counter() - begin

        scored = self.mesh.sum(sum(batch.scored for batch in batches))
        if not scored:
            raise UserError(
                f"step {step + 1}: no token is scored, every label is masked: do "
                f"recipe={self.run.name} and its settings fit data.store?"
            )
        total = 0.0
        for batch in batches:
            loss_sum, _ = self.engine(**batch.to(self.mesh.device).tensors())
            self.engine.backward(loss_sum, scored)
            total += float(loss_sum.detach())

        loss = self.mesh.sum(total) / scored
        lr = learning_rate(step, self.run.train.max_steps, self.run.optim)
        grad_norm, taken = self.engine.step(lr, partial(self.guard.accepts, loss))
        skipped = self.guard.note(step + 1, loss, grad_norm, taken)
        if skipped and self.mesh.main:
            say(skipped)
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            tokens=self.step_tokens,
            seconds=time.perf_counter() - begin,
            data_seconds=data_seconds,
            flops=sum(meter.batch_flops(self.counts, b) for b in rows) / self.mesh.sp_size,
            taken=taken,
        )

    def evaluate(self) -> float | None:
        """Held-out loss over the same first `eval_rows` rows each time; None without such data."""
        if self.data.held_out is None:
            return None
        self.engine.train(False)
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in self.data.held_out.step(0, self.mesh.dp_rank, self.mesh.dp_size):
                part = shard(batch, self.mesh).to(self.mesh.device)
                loss_sum, tokens = self.engine(**part.tensors())
                total, count = total + float(loss_sum), count + int(tokens)
        self.engine.train(True)
        loss, scored = self.mesh.sums(total, count)
        if not scored:
            raise UserError("no held-out token is scored; every label of data.held_out is masked")
        return loss / scored

    def save_last(self) -> Path:
        """The path of a complete checkpoint of this step, written now unless it exists."""
        self.saver.finish()
        path = writer.place(self.checkpoints, self.step)
        if self.saver.last != path:
            self.saver.save_and_wait(self.step, self.engine.state(), self._about())
        return path

    def _about(self) -> dict[str, Any]:
        """What a checkpoint of this step holds in addition to the weights."""
        return {
            "tokens": self.tokens,
            "guard": self.guard.state(),
            "run": dataclasses.asdict(self.run),
            "fingerprint": self.fingerprint,
            "torch": torch.__version__,
        }

    def _due(self, every: int) -> bool:
        return self.step == self.run.train.max_steps or (every > 0 and self.step % every == 0)

    def _metrics(self, result: StepResult, held_out: float | None) -> dict[str, float | int | None]:
        peak = meter.peak_flops(self.mesh.device)
        line: dict[str, float | int | None] = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "seconds": result.seconds,
            "tokens_per_second": result.tokens / result.seconds,
            "mfu": result.flops / result.seconds / peak,
            "peak_memory_bytes": meter.peak_memory(self.mesh.device),
            "data_seconds": result.data_seconds,
            "skipped": self.guard.skipped,
        }
        return line if held_out is None else {**line, "eval_loss": held_out}

    def _open_log(self) -> Log | None:
        if not self.mesh.main:
            return None
        self.run_dir.mkdir(parents=True, exist_ok=True)
        for leftover in self.checkpoints.glob("*.tmp"):
            shutil.rmtree(leftover)
        config = dataclasses.asdict(self.run)
        wandb = self.run.wandb if self.run.logger == "wandb" else None
        return Log(self.run_dir, config, self.step, self.run.train.max_steps, wandb)

    def _find_checkpoint(self) -> reader.Checkpoint | None:
        """The checkpoint that `resume` asks for; the ranks share the work of checking it."""
        wanted = self.run.resume
        if wanted not in ("auto", "none"):
            named = reader.open_checkpoint(Path(wanted), self.mesh)
            reader.refuse_later(self.checkpoints, named, self.mesh)
            return named
        found, problems = reader.newest(self.checkpoints, self.mesh)
        if wanted == "none" and (found or problems):
            raise UserError(
                f"{self.checkpoints} already holds checkpoints: take another run_dir, "
                "or resume=auto to go on"
            )
        if problems and not found:
            raise UserError(
                f"{problems[0]}, and there is no older valid checkpoint: take another run_dir"
            )
        if self.mesh.main:
            for line in problems:
                say(f"warning: {line}; trying an older checkpoint")
            if found:
                say(f"resuming from {found.path}")
        return found
