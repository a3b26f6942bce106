import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from longctx.config import OptimConfig
from longctx.train.optim import adamw, freeze_all_but, learning_rate

CONFIG = OptimConfig(
    lr=2.0,
    betas=[0.9, 0.95],
    eps=1e-8,
    weight_decay=0.1,
    clip=1.0,
    schedule="cosine",
    warmup_steps=10,
    warmup_from=0.1,
    final_fraction=0.05,
)


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [("constant", 2.0, 2.0), ("linear", 1.05, 0.1), ("cosine", 1.05, 0.1)],
)
def test_end_points(schedule, middle, last):
    config = dataclasses.replace(CONFIG, schedule=schedule)
    at = {s: learning_rate(s, 111, config) for s in (0, 5, 10, 60, 110)}
    assert at == pytest.approx({0: 0.2, 5: 1.1, 10: 2.0, 60: middle, 110: last}, rel=1e-12)


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 60),
    steps=st.integers(1, 50),
    start=st.floats(0, 1),
    end=st.floats(0, 1),
)
def test_rises_then_falls_between_its_bounds(schedule, warmup, steps, start, end):
    config = dataclasses.replace(
        CONFIG, schedule=schedule, warmup_steps=warmup, warmup_from=start, final_fraction=end
    )
    rates = [learning_rate(s, steps, config) for s in range(steps)]
    near = 1e-12
    assert all(0 <= rate <= config.lr + near for rate in rates)
    up, down = rates[: warmup + 1], rates[warmup:]
    assert all(a <= b + near for a, b in pairwise(up))
    assert all(a >= b - near for a, b in pairwise(down))


def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def test_decay_on_matrices_only():
    net = model()
    groups = adamw(net.parameters(), CONFIG).param_groups
    decayed = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    found = {name: decayed[id(p)] for name, p in net.named_parameters()}
    assert found == {
        "0.weight": 0.1,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": 0.1,
        "2.bias": 0.0,
    }
    assert all((g["lr"], g["betas"], g["eps"]) == (2.0, (0.9, 0.95), 1e-8) for g in groups)


def test_no_empty_group():
    assert len(adamw([nn.Parameter(torch.ones(2, 2))], CONFIG).param_groups) == 1


def test_only_the_chosen_learn():
    net = model()
    net[2].weight.requires_grad_(False)
    freeze_all_but(net, {"2.weight": net[2].weight, "1.bias": net[1].bias})
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {"2.weight", "1.bias"}
