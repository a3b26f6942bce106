"""DeepSpeed, behind six functions: the configuration, the engine, backward, step, state in and out.

The DeepSpeed JSON is derived from typed fields here and written nowhere else. No `mpu` is passed:
with it, stages 0-2 and stage 3 divide gradients differently and one of them is wrong.
"""

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from longctx.config import RunConfig
from longctx.parallel.mesh import Mesh

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# An inference-only shared-memory op that DeepSpeed would compile for a minute on CPU, under a file
# lock that a killed run never releases.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET_GPU, BUCKET_CPU = 200_000_000, 5_000_000  # communication buckets, elements
# DeepSpeed reports the gradient norm only where it clips; this bound never does.
NEVER_CLIPS = 1e30


def deepspeed_config(run: RunConfig, ranks: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run.

    Args:
        run: the run.
        ranks: data-parallel size.
    """
    bucket = BUCKET_GPU if torch.cuda.is_available() else BUCKET_CPU
    stage = run.parallel.zero_stage
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket}
    if stage in (1, 2):
        zero["allgather_bucket_size"] = bucket
    if stage == 3:
        zero["stage3_prefetch_bucket_size"] = bucket
        zero["stage3_param_persistence_threshold"] = min(100_000, bucket)
    return {
        "train_micro_batch_size_per_gpu": run.train.micro_batch_rows,
        "gradient_accumulation_steps": run.train.accumulation(ranks),
        "zero_optimization": zero,
        "bf16": {"enabled": run.train.dtype == "bf16"},
        "gradient_clipping": run.optim.clip or NEVER_CLIPS,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


class Engine:
    """A DeepSpeed engine with an exact loss scale.

    Args:
        module: called as `module(**tensors) -> (sum, count)`.
        trainable: its trained parameters, by name.
        optimizer: over the same parameters.
        run: the run.
        mesh: the ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        trainable: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        run: RunConfig,
        mesh: Mesh,
    ) -> None:
        deepspeed.init_distributed(verbose=False)
        self.stage = run.parallel.zero_stage
        self.ranks = mesh.dp_size
        self.trainable = trainable
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            model_parameters=list(trainable.values()),
            config=deepspeed_config(run, mesh.dp_size),
        )

    def __call__(self, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        """(sum, count) of one micro-batch; see `Recipe.loss`."""
        result: tuple[Tensor, Tensor] = self.engine(**tensors)
        return result

    def train(self, mode: bool) -> None:
        """Training or evaluation mode."""
        self.engine.train(mode)

    def backward(self, loss_sum: Tensor, scored: float) -> None:
        """Adds this micro-batch's share of the gradient of (global sum) / (global count).

        Every stage averages gradients over the ranks, hence the factor; accumulation is a plain
        sum, because `scored` already counts the whole step.

        Args:
            loss_sum: scalar, of this micro-batch.
            scored: scored tokens of the whole step, over all ranks and micro-batches.
        """
        self.engine.backward(loss_sum * (self.ranks / scored), scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # only counts the micro-batch

    def step(self, lr: float) -> float:
        """Clips, updates, and clears the gradients.

        Args:
            lr: learning rate of this step.

        Returns:
            The global gradient norm before clipping.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        norm = self._plain_norm() if self.stage == 0 else None
        self.engine.step()
        return float(self.engine.get_global_grad_norm()) if norm is None else norm

    def _plain_norm(self) -> float:
        grads = [p.grad for p in self.trainable.values() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Each trained parameter's name, fp32 weight and Adam moments, whole, on CPU.

        Collective: all ranks walk the parameters together.
        """
        self._link_fragments()
        for name, parameter in self.trainable.items():
            yield name, {k: v.detach().cpu() for k, v in self._full(parameter).items()}

    def _full(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if self.stage == 0:
            moments = self.engine.optimizer.state[parameter]
            return {"weight": parameter, **{m: moments[m] for m in MOMENTS}}
        moments = {m: safe_get_full_optimizer_state(parameter, m) for m in MOMENTS}
        return {"weight": safe_get_full_fp32_param(parameter), **moments}

    def restore(self, step: int, state: Iterator[tuple[str, dict[str, Tensor]]]) -> None:
        """Takes back what `state` gave, on any stage and number of ranks.

        The module must have been given the same weights before the engine was built.

        Args:
            step: optimizer steps already taken.
            state: as `state()` yields it, for every trained parameter.
        """
        taken = torch.tensor(float(step))
        if self.stage:
            zero = self.engine.optimizer
            flat = zero.fp32_partitioned_groups_flat if self.stage == 3 else None
            for part in flat or zero.single_partition_of_fp32_groups:
                empty = {m: torch.zeros_like(part) for m in MOMENTS}
                zero.optimizer.state[part] = {"step": taken.clone(), **empty}
            self._link_fragments()
        for name, values in state:
            parameter = self.trainable[name]
            if self.stage == 0:
                parameter.data.copy_(values["weight"])
                moments = {m: values[m].to(parameter.device) for m in MOMENTS}
                self.engine.optimizer.state[parameter] = {"step": taken.clone(), **moments}
                continue
            safe_set_full_fp32_param(parameter, values["weight"].to(parameter.device))
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, values[moment], moment)
        self.engine.global_steps = step

    def _link_fragments(self) -> None:
        """Stages 1 and 2 link a parameter to its state only after the first group's first step."""
        if self.stage in (1, 2):
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def close(self) -> None:
        """Releases hooks and buffers, so that another engine can be built in this process."""
        self.engine.destroy()
