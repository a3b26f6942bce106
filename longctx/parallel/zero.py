"""DeepSpeed, behind six functions: the configuration, the engine, backward, step, state in and out.

The DeepSpeed JSON is derived from typed fields here and written nowhere else. No `mpu` is passed:
with it, stages 0-2 and stage 3 divide gradients differently and one of them is wrong.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from longctx.config import RunConfig
from longctx.parallel.deepspeed_config import deepspeed_config as deepspeed_config  # noqa: PLC0414
from longctx.parallel.mesh import Mesh

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    set_z3_leaf_module,
)

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# Of a skipped step the trainer says why; DeepSpeed would call any of them not finite.
logging.getLogger("DeepSpeed").addFilter(lambda line: "OVERFLOW!" not in line.getMessage())
# An inference-only shared-memory op that DeepSpeed would compile for a minute on CPU, under a file
# lock that a killed run never releases.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

MOMENTS = ("exp_avg", "exp_avg_sq")
Read = Callable[[], Tensor]


class _Given(nn.Module):
    """A module whose parameters get dtype and value at the moment they are asked for.

    `zero.Init` asks for one, shards it and asks for the next; so the weights of all others may
    still be mapped files.

    Args:
        module: the module.
        dtype: of all its parameters.
        weights: by parameter, what reads its value; others keep theirs.
    """

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, weights: Mapping[nn.Parameter, Read]
    ) -> None:
        super().__init__()
        self.module, self.dtype, self.weights = module, dtype, weights

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The module's parameters, each once."""
        for parameter in self.module.parameters(recurse):
            read = self.weights.get(parameter)
            parameter.data = (read() if read else parameter.data).to(self.dtype)
            yield parameter


def _cut(
    module: nn.Module,
    config: dict[str, Any],
    device: torch.device,
    weights: Mapping[nn.Parameter, Read],
) -> None:
    """Shards a built module one parameter at a time: no rank ever holds all of it on its device.

    `deepspeed.initialize` would move all of it to the device first. What it does beside that to a
    module that it finds whole is done here: one dtype, and buffers on the device.

    Args:
        module: with the same weights on all ranks; its parameters are changed in place.
        config: DeepSpeed's.
        device: of the rank.
        weights: see `_Given`.
    """
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)
    given = _Given(module, dtype, weights)
    deepspeed.zero.Init(module=given, config_dict_or_path=config, dtype=dtype)
    given.weights = {}  # closes the files


class Engine:
    """A DeepSpeed engine with an exact loss scale.

    Args:
        module: called as `module(**tensors) -> (sum, count)`.
        trainable: its trained parameters, by name.
        optimizer: over the same parameters.
        run: the run.
        mesh: the ranks.
        weights: by name of a trained parameter, what reads the value that it is to have in place
            of its own. On ZeRO 3 it is read as that parameter is sharded.
    """

    def __init__(
        self,
        module: nn.Module,
        trainable: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        run: RunConfig,
        mesh: Mesh,
        weights: Mapping[str, Read] = MappingProxyType({}),
    ) -> None:
        deepspeed.init_distributed(verbose=False)
        self.stage = run.parallel.zero_stage
        self.ranks = mesh.ranks
        self.trainable = trainable
        if self.stage == 3:
            for part in module.modules():
                if hasattr(part, "tile"):  # its function takes all its weights, whole
                    set_z3_leaf_module(part, True)
        config = deepspeed_config(run, mesh.dp_size)
        if self.stage == 3:
            reads = {trainable[name]: read for name, read in weights.items()}
            _cut(module, config, mesh.device, reads)
        else:
            for name, read in weights.items():
                trainable[name].data.copy_(read())
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            model_parameters=list(trainable.values()),
            config=config,
        )
        self.norm = math.inf  # of the step being taken, before clipping
        self.accepts: Callable[[float], bool] = math.isfinite
        if self.stage:
            self._judge_the_norm()

    def _judge_the_norm(self) -> None:
        """Lets `accepts` decide between DeepSpeed's gradient norm and its update.

        DeepSpeed measures the norm, and drops the step and its gradients by itself if that is not
        finite; so a step that is not wanted gets such a norm. On this engine alone.
        """
        zero = self.engine.optimizer
        name = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        measure = getattr(zero, name)

        def judged() -> Any:
            found = measure()
            self.norm = float(combine_grad_norm_groups(found) if self.stage == 3 else found)
            if self.accepts(self.norm):
                return found
            return [torch.tensor(math.inf)] if self.stage == 3 else torch.tensor(math.inf)

        setattr(zero, name, judged)

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

    def step(
        self, lr: float, accepts: Callable[[float], bool] = math.isfinite
    ) -> tuple[float, bool]:
        """Clips and updates, unless the norm is not accepted; clears the gradients in any case.

        Args:
            lr: learning rate of this step.
            accepts: whether to update, from the global gradient norm before clipping. It must
                decide alike on all ranks, and accept nothing that is not finite.

        Returns:
            That norm (inf where it is not finite), and whether there was an update.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.norm, self.accepts = math.inf, accepts
        if self.stage:
            self.engine.step()
            return self.norm, bool(self.engine.was_step_applied())
        self.norm = self._plain_norm()
        if accepts(self.norm):
            self.engine.step()
            return self.norm, True
        self.engine.zero_grad()
        self.engine.micro_steps += 1  # this was the step's last one
        return self.norm, False

    def _plain_norm(self) -> float:
        grads = [p.grad for p in self.trainable.values() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Each trained parameter's name, fp32 weight and Adam moments, whole.

        Collective: all ranks walk the parameters together. On the device, and possibly what the
        next step changes: copy what you keep.
        """
        self._add_moments()
        for name, parameter in self.trainable.items():
            yield name, {k: v.detach() for k, v in self._full(parameter).items()}

    def _full(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if self.stage == 0:
            moments = self.engine.optimizer.state[parameter]
            return {"weight": parameter, **{m: moments[m] for m in MOMENTS}}
        moments = {m: safe_get_full_optimizer_state(parameter, m) for m in MOMENTS}
        return {"weight": safe_get_full_fp32_param(parameter), **moments}

    def restore(self, step: int, state: Iterator[tuple[str, dict[str, Tensor]]]) -> None:
        """Takes back what `state` gave, on any stage and number of ranks.

        The engine must have been built with the same weights.

        Args:
            step: updates already made.
            state: as `state()` yields it, for every trained parameter.
        """
        self._add_moments(step)
        for name, values in state:
            parameter = self.trainable[name]
            if self.stage == 0:
                parameter.data.copy_(values["weight"])
                for moment in MOMENTS:
                    self.engine.optimizer.state[parameter][moment].copy_(values[moment])
                continue
            safe_set_full_fp32_param(parameter, values["weight"].to(parameter.device))
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, values[moment], moment)
        self.engine.global_steps = step

    def _add_moments(self, step: int | None = None) -> None:
        """Gives parameters moments of zeros, as Adam's first step does.

        Args:
            step: updates that they have seen, for all parameters; None: only where there are none.
        """
        zero = self.engine.optimizer
        if self.stage == 0:
            optimizer, parts = zero, list(self.trainable.values())
        else:
            flat = zero.fp32_partitioned_groups_flat if self.stage == 3 else None
            optimizer, parts = zero.optimizer, flat or zero.single_partition_of_fp32_groups
        for part in parts:
            if step is not None or not optimizer.state.get(part):
                empty = {m: torch.zeros_like(part) for m in MOMENTS}
                optimizer.state[part] = {"step": torch.tensor(float(step or 0)), **empty}
        # Stages 1 and 2 link a parameter to its state only after the first group's first step.
        if self.stage in (1, 2):
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def close(self) -> None:
        """Releases hooks and buffers, so that another engine can be built in this process."""
        self.engine.destroy()
