"""An update of the weights: what is trained, how fast, and which steps are left out.

A step that would do harm updates nothing: it is counted, and the run goes on. Bad is a loss or a
gradient norm that is not finite and, where `train.skip_above` asks for it, a norm far above the
usual one. All ranks see the same two numbers, so all decide alike; the norm is the one that
clipping needs anyway.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from longctx.config import OptimConfig, TrainConfig
from longctx.errors import UserError

WINDOW = 100  # accepted steps whose median norm is the usual one
FEWEST = 20  # of them before any norm counts as unusual


def freeze_all_but(model: nn.Module, trainable: dict[str, nn.Parameter]) -> None:
    """Switches gradients on for the given parameters and off for all others.

    Args:
        model: any module.
        trainable: parameters of it, by name.
    """
    chosen = {id(p) for p in trainable.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def adamw(trainable: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices only (norms and biases are left alone).

    Args:
        trainable: parameters, each once.
        config: its numbers.
    """
    parameters = list(trainable)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    beta1, beta2 = config.betas
    used = [g for g in groups if g["params"]]
    return torch.optim.AdamW(used, lr=config.lr, betas=(beta1, beta2), eps=config.eps)


def learning_rate(step: int, max_steps: int, config: OptimConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Linear warm-up from `warmup_from * lr` to `lr` over `warmup_steps`, then the schedule down to
    `final_fraction * lr` at the last step.

    Source: the shape of the warm-up is that of PI, 2306.15595 section 3.1.

    >>> from longctx.config import OptimConfig
    >>> pi = OptimConfig(2e-5, [0.9, 0.95], 1e-8, 0.0, 1.0, "constant", 20, 0.1, 0.0)
    >>> [round(learning_rate(s, 1000, pi) * 1e6, 2) for s in (0, 10, 20, 999)]
    [2.0, 11.0, 20.0, 20.0]
    """
    if step < config.warmup_steps:
        rise = step / config.warmup_steps
        return config.lr * (config.warmup_from + (1 - config.warmup_from) * rise)
    if config.schedule == "constant":
        return config.lr
    span = max(1, max_steps - 1 - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / span)
    shape = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.lr * (config.final_fraction + (1 - config.final_fraction) * shape)


class DivergedError(UserError):
    """The run no longer gets anywhere. All ranks raise it at the same step."""


@dataclass
class Guard:
    """Which steps are taken. Its state is kept with each checkpoint.

    Args:
        config: `max_skipped` and `skip_above`.
        skipped: steps left out so far.
        in_a_row: of them, those since the last accepted one.
        norms: gradient norms of the last accepted steps, before clipping; oldest first.
    """

    config: TrainConfig
    skipped: int = 0
    in_a_row: int = 0
    norms: list[float] = field(default_factory=list)

    def accepts(self, loss: float, norm: float) -> bool:
        """Whether a step of this loss and gradient norm is to be taken."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return False
        limit = self.config.skip_above
        if not limit or len(self.norms) < FEWEST:
            return True
        return norm <= limit * statistics.median(self.norms)

    def note(self, step: int, loss: float, norm: float, taken: bool) -> str | None:
        """Counts a step that is over.

        Args:
            step: its number, from 1.
            loss: its loss.
            norm: its gradient norm.
            taken: True if the step was accepted.

        Returns:
            A line about a step that was left out; None for one that was taken.

        Raises:
            DivergedError: if it is one too many in a row.
        """
        if taken:
            self.in_a_row = 0
            self.norms = [*self.norms, norm][-WINDOW:]
            return None
        self.skipped += 1
        self.in_a_row += 1
        seen = f"the loss is {loss:.4g}, the gradient norm {norm:.4g}"
        if self.in_a_row >= self.config.max_skipped:
            raise DivergedError(
                f"step {step}: {seen}; that is bad step number {self.in_a_row} in a row "
                f"(train.max_skipped={self.config.max_skipped}). None of them was taken, and what "
                "is saved is finite. Lower optim.lr?"
            )
        if self.norms and math.isfinite(loss) and math.isfinite(norm):
            seen += f", usual is {statistics.median(self.norms):.4g}"
        return f"warning: step {step} skipped: {seen} ({self.skipped} skipped so far)"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able and exact."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "norms": self.norms}
