"""Every attention method that is found, at the numbers of its example: what the shared tests hold.

A method is found by its file in `longctx/attention/` or in `conf/attention/`; its example is
`tests/examples/attention/NAME.yaml`, sets of numbers by a name. A set must fit a model with three
layers of four query heads and a window of 64 tokens. The first stands for the method where one must
do: it also fits a window of 12, and differs from full attention within 32 tokens.
"""

import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from longctx.attention.method import EvictingMethod, Method
from longctx.attention.ops import oracle
from longctx.errors import UserError
from longctx.models.choose import attention_method, attention_methods, method_class
from tests.helpers.process import ROOT

EXAMPLES = ROOT / "tests" / "examples" / "attention"
NAMES = sorted({*attention_methods(), *(p.stem for p in (ROOT / "conf/attention").glob("*.yaml"))})
WINDOW, LAYERS = 64, 3


def example(name: str) -> dict[str, dict[str, Any]]:
    """The sets of numbers of a method by their names; empty if it has no example."""
    path: Path = EXAMPLES / f"{name}.yaml"
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return {str(key): {"name": name, **numbers} for key, numbers in (found or {}).items()}


def first(name: str) -> dict[str, Any]:
    """The numbers that stand for a method, with its name; fails if it has no example."""
    sets = list(example(name).values())
    assert sets, f"attention {name!r} has no example tests/examples/attention/{name}.yaml"
    return sets[0]


def complete(name: str) -> bool:
    """Whether its YAML gives every number; one with `???` needs numbers of the model at hand."""
    path = ROOT / "conf" / "attention" / f"{name}.yaml"
    return path.is_file() and "???" not in (yaml.safe_load(path.read_text()) or {}).values()


FIRST = {name: first(name) for name in NAMES if example(name)}


def kind_of(name: str) -> type[Method]:
    """The class of a method; of one that cannot be read, the base."""
    try:
        return method_class(name)
    except UserError:
        return Method


CASES = {f"{name}: {key}": numbers for name in NAMES for key, numbers in example(name).items()}
ANYWHERE = [case for case in CASES if not kind_of(CASES[case]["name"]).from_beginning]
EVICTING = [name for name in FIRST if issubclass(kind_of(name), EvictingMethod)]
EVICTING_CASES = [case for case in CASES if CASES[case]["name"] in EVICTING]


def method_of(case: str | dict[str, Any], heads: int = 4, key_heads: int = 4) -> Method:
    """The method of a case in a model of so many heads; skips heads that its numbers refuse."""
    method = attention_method(CASES[case] if isinstance(case, str) else case).for_window(WINDOW)
    try:
        return method.for_layers(LAYERS, heads, key_heads)
    except UserError as error:
        pytest.skip(f"{key_heads} key heads: {error}")


def live_pairs(method: Method, length: int, layer: int, heads: int = 4) -> Tensor:
    """`[heads length length]` bool, which pairs attend by the definition."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    live, _ = method.definition(i, j, layer, torch.arange(heads)[:, None, None])
    return live.expand(heads, length, length)


# --- the fast path beside the oracle --------------------------------------------------------------

B, S, D = 3, 41, 8
INV_FREQ = 10000.0 ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
ROTARY = types.SimpleNamespace(inv_freq=INV_FREQ)
POSITIONS = {
    "one document": torch.arange(S)[None].expand(B, S),
    "one row of positions": torch.arange(S)[None],
    "packed alike": torch.tensor([[p for n in (20, 1, 20) for p in range(n)]] * B),
    "packed": torch.tensor(
        [[p for n in row for p in range(n)] for row in ((20, 1, 20), (41,), (7, 34))]
    ),
    "from position 17": torch.arange(17, 17 + S)[None].expand(B, S),
}
PADDINGS = {
    "left": torch.tensor([[i >= n for i in range(S)] for n in (0, 5, 33)]),
    "right": torch.tensor([[i < n for i in range(S)] for n in (S, 7, 1)]),
    "alike": torch.tensor([[i >= 4 for i in range(S)]] * B),
    "empty row": torch.tensor([[True] * S, [False] * S, [i < 9 for i in range(S)]]),
}


def inputs(heads: int, key_heads: int, seed: int = 0) -> list[Tensor]:
    """Query, key and value `[B h S D]` in float64, before rotation."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, h, S, D) for h in (heads, key_heads, key_heads)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def attention_layer(index: int = 0) -> nn.Module:
    """An attention layer of that index, as far as a method looks at it."""
    module = nn.Module()
    module.layer_idx = index
    return module


def of_model(method: Method, query: Tensor, key: Tensor) -> Method:
    """A method with the heads of these tensors."""
    try:
        return method.for_layers(LAYERS, query.shape[1], key.shape[1])
    except UserError as error:
        pytest.skip(f"{key.shape[1]} key heads: {error}")


def call(method, query, key, value, positions, mask=None, index=0, **rest) -> Tensor:
    """The fast path behind the rotation that the model's rotary module does."""
    m, n = query.shape[2], key.shape[2]
    method = of_model(method, query, key)
    angles = method.key_positions(positions)[:, None, :, None] * INV_FREQ
    q = oracle.rotate(query, angles[:, :, n - m :])
    k = oracle.rotate(key, angles)
    rest |= {"position_ids": positions[:, n - m :], "rotary": ROTARY}
    return method.attend(attention_layer(index), q, k, value, mask, **rest)[0]


def compare(method, tensors, positions, mask=None, new=S, index=0, **rest) -> None:
    """Forward and every gradient of the last `new` tokens, and of the oracle."""
    query, key, value = (x.clone().requires_grad_() for x in tensors)
    query = query[:, :, S - new :]
    ours = call(method, query, key, value, positions, mask, index, **rest)
    definition = of_model(method, query, key).definition
    given = (definition, query, key, value, positions.expand(B, S), mask)
    theirs = oracle.attend(*given, inv_freq=INV_FREQ, layer=index, **rest)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weight = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1)).double()
    got = torch.autograd.grad((ours * weight).sum(), (query, key, value))
    want = torch.autograd.grad((theirs * weight).sum(), (query, key, value))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
