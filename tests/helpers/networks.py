"""Tiny decoders of random weights, and plain twins of them that know nothing of longctx."""

import torch
from transformers import AutoModelForCausalLM

from longctx.models.load import build_model

WINDOW = 12
KINDS = {"llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {"head_dim": 8}}


def network(kind="llama", attention=None, rope=None, **more):
    """A decoder in float64 with a window of `WINDOW` and a vocabulary of 64."""
    architecture = {
        "model_type": kind, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": WINDOW, "initializer_range": 0.3,
        "eos_token_id": None, "bos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    } | KINDS[kind] | more  # fmt: skip
    return build_model(architecture, attention, rope, torch.float64).eval()


def plain_twin(ours):
    """The same weights in a plain transformers model with its own attention."""
    fields = {k: v for k, v in ours.config.to_diff_dict().items() if not k.startswith("longctx_")}
    del fields["model_type"]
    config = getattr(type(ours.config), "stock", type(ours.config))(**fields)
    twin = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    twin.load_state_dict(ours.state_dict())
    return twin.double().eval()


def tokens(rows, length, seed=0):
    """`[rows length]` random tokens, never 0."""
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
