"""What is trained and how fast: freezing, parameter groups, learning rate as f(step)."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from longctx.config import OptimConfig


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
