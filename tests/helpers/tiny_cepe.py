"""Tiny CEPE models of random weights in float64, and contexts for them."""

import torch

from longctx.models.cepe.encoder import build_encoder
from longctx.models.cepe.model import CepeForCausalLM
from tests.helpers.networks import network

ENCODER = {
    "vocab_size": 65, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 3, "max_position_embeddings": 16, "initializer_range": 0.3,
}  # fmt: skip


def encoder(seed=1, **more):
    """An encoder in float64 for the decoders of `networks`: 64 tokens and a mask."""
    return build_encoder(ENCODER | more, torch.float64, seed).eval()


def cepe(kind="llama", init="copy", attention=None, cross_layers=None, **more):
    """A model whose cross-attention is not a copy of anything, unless `init` is zero."""
    decoder = network(kind, attention, **more)
    model = CepeForCausalLM.from_parts(decoder, encoder(), cross_layers, init)
    if init != "zero":
        shake(model)
    return model.eval()


@torch.no_grad()
def shake(model, seed=3):
    """Moves cross-attention away from its start."""
    random = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if ".cross_attn." in name:
            weight.add_(torch.randn(weight.shape, generator=random, dtype=weight.dtype), alpha=0.2)


def contexts(rows=2, chunks=3, length=7, seed=5):
    """`[rows chunks length]` random tokens."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(1, 64, (rows, chunks, length), generator=random)
