"""The merge in pieces: slabs of keys in the backward pass, what is held, half precision."""

import types

import pytest
import torch
from torch import nn

from longctx.attention import dca
from longctx.attention.dca import DualChunk
from longctx.attention.ops import flash, merge, parts

S, D = 61, 8


def gradients(dtype=torch.float64, slab=None, monkeypatch=None):
    """Output and gradients of several chunks, two documents, shared key heads."""
    if slab is not None:
        monkeypatch.setattr(parts, "SLAB", slab)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, S, D, generator=generator).to(dtype).requires_grad_() for h in (4, 2, 2)
    )
    layer = nn.Module()
    inv_freq = 10000.0 ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
    layer.layer_idx = 0
    rotary = types.SimpleNamespace(inv_freq=inv_freq)
    positions = torch.cat([torch.arange(50), torch.arange(11)])[None]
    out = DualChunk(6, 4, 10).attend(layer, q, k, v, None, position_ids=positions, rotary=rotary)[0]
    weight = torch.randn(out.shape, generator=generator).to(dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), (q, k, v))]


@pytest.mark.parametrize("slab", [1, 7, 38, 39])
def test_slabs_change_no_gradient(slab, monkeypatch):
    whole = gradients()
    for a, b in zip(whole, gradients(slab=slab, monkeypatch=monkeypatch), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_blocks_below_a_chunk_change_nothing(rows, monkeypatch):
    whole = gradients()
    monkeypatch.setattr(dca, "ROWS", rows)
    for a, b in zip(whole, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_slabs_cover_the_keys_once():
    found = [i for s in parts.Part(3, 5003).slabs() for i in range(s.start, s.stop)]
    assert found == list(range(3, 5003))
    lengths = [s.stop - s.start for s in parts.Part(3, 5003).slabs()]
    assert max(lengths) == parts.SLAB
    assert parts.Part(0, 5000, causal=True).slabs() == [slice(0, 5000)]


def test_half_precision_merges_and_accumulates_in_fp32():
    """Errors of bf16 stay those of rounding each operand once, over eight chunks."""
    exact, half = gradients(), gradients(torch.bfloat16)
    for a, b in zip(exact, half, strict=True):
        assert b.dtype == torch.bfloat16
        assert (a - b.double()).norm() / a.norm() < 0.01


def test_the_dense_fallback_is_the_kernel(monkeypatch):
    """What a GPU without a flash kernel for a type runs, here on the CPU."""
    exact = gradients()
    monkeypatch.setattr(merge, "flash", flash.dense)
    monkeypatch.setattr(merge, "flash_backward", flash.dense_backward)
    for a, b in zip(exact, gradients(torch.float32), strict=True):
        torch.testing.assert_close(b.double(), a, rtol=1e-4, atol=1e-5)
