"""How attention is cut: a part with nothing in it is left out, and never reaches a kernel."""

import pytest
import torch

from longctx.attention.ops import merge
from longctx.attention.ops.parts import Block, Part

EMPTY = [
    Part(0, 0),
    Part(5, 5, causal=True),
    Part(7, 3, "turn"),
    Part(0, 0, causal=True, fold=2),
    Part(0, 0, fold=2, half=True),
    Part(0, 4, rows=(2, 2)),
    Part(0, 4, heads=(1, 1)),
]


def attention(blocks, m=6, n=10):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, x, 8, generator=generator).double().requires_grad_()
        for h, x in ((4, m), (2, n), (2, n))
    )
    out = merge.attend(q, k, v, blocks, {"turn": torch.zeros(m)}, torch.ones(4), None)
    return [out, *torch.autograd.grad(out.sum(), (q, k, v))]


@pytest.mark.parametrize("empty", EMPTY, ids=str)
def test_an_empty_part_changes_nothing(empty):
    """On the CPU a kernel that is called without keys ends the process."""
    parts = [Part(0, 4), Part(4, 10, causal=True)]
    expected = attention([Block(0, 6, parts)])
    for at in range(3):
        found = attention([Block(0, 6, [*parts[:at], empty, *parts[at:]])])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert empty.is_empty and not any(part.is_empty for part in parts)


def test_rows_that_see_nothing_are_zero():
    out, d_q, d_k, d_v = attention([Block(0, 2, [Part(0, 0)]), Block(2, 6, [Part(0, 10)])])
    assert (out[:, :, :2] == 0).all() and (d_q[:, :, :2] == 0).all()
    assert (out[:, :, 2:] != 0).all() and (d_k != 0).any() and (d_v != 0).any()


def test_a_block_without_rows():
    expected = attention([Block(0, 6, [Part(0, 10)])])
    found = attention([Block(0, 0, [Part(0, 10)]), Block(0, 6, [Part(0, 10)])])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
