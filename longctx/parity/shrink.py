"""A user's run at tiny size: the same recipe, attention, rope and losses, in a second on a CPU.

What a setting says in tokens, layers or heads shrinks with the row; what it says of the method
stays. Weights are random, documents too: parity of gradients asks for neither.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from longctx.config import AdapterConfig, ModelConfig, RunConfig
from longctx.data.store import StoreWriter
from longctx.models.choose import attention_method
from longctx.models.load import architecture_of
from longctx.recipe import find_recipe

ROW, ROWS = 64, 8  # tokens of a row, rows of a step
VOCAB, HEADS, LAYERS = 64, 4, 3
LEAST_WINDOW = 16  # tokens
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "head_dim": 8, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
BY_LAYER = ("layer_types", "max_window_layers", "no_rope_layers")  # lists that go by the layer


def write_store(path: Path, seed: int = 0) -> Path:
    """A token store of random documents, so short that most rows hold several, some cut."""
    draw = np.random.default_rng(seed)
    with StoreWriter(
        path, tokenizer_sha256="0" * 64, vocab_size=VOCAB, bos_id=1, eos_id=2, source={"seed": seed}
    ) as store:
        # Long ones too: rows with contexts are cut inside one document.
        for length in (*draw.integers(4, ROW // 2, 300), *draw.integers(ROW, 4 * ROW, 12)):
            store.add(np.array([1, *draw.integers(4, VOCAB, length - 2), 2]))
    return path


def tiny(run: RunConfig, place: Path) -> RunConfig:
    """The run, shrunk; it reads the store in `place/store` and writes below `place`.

    Args:
        run: what the user would train; its data and weights are not opened.
        place: a directory of its own.

    Raises:
        UserError: if the model's configuration cannot be read.
    """
    full: Any = run.model.architecture or architecture_of(str(run.model.path))
    window = int(full["max_position_embeddings"])
    short = max(LEAST_WINDOW, round(window * ROW / run.data.seq_len))
    target = run.rope.target and max(short, round(run.rope.target * short / window))
    store = [str(place / "store")]
    return replace(
        run,
        model=ModelConfig(run.model.name, None, _architecture(full, short), None),
        attention=_attention(run.attention, int(full["num_hidden_layers"])),
        rope=replace(run.rope, target=target),
        adapter=_adapter(run.adapter),
        data=replace(run.data, store=store, held_out=[], seq_len=ROW, weights=None,
                     long_tokens=None, mask_documents=True, prefetch=0),
        # The first step's moments are the gradient, and nothing may scale it on the way.
        optim=replace(run.optim, clip=0.0),
        train=replace(run.train, max_steps=2, batch_rows=ROWS, dtype="fp32", eval_every=0,
                      eval_rows=ROWS, save_every=0),
        logger="none", resume="none", dry_run=False, run_dir=str(place / "run"),
        **find_recipe(run.builder).tiny(run, ROW, VOCAB),
    )  # fmt: skip


def _architecture(full: dict[str, Any], window: int) -> dict[str, Any]:
    """The architecture with few and small layers; grouped key heads stay grouped."""
    kept = {k: v for k, v in full.items() if k not in BY_LAYER}
    groups = full.get("num_key_value_heads") or full["num_attention_heads"]
    heads = HEADS if groups == full["num_attention_heads"] else HEADS // 2
    return {**kept, **SIZES, "num_key_value_heads": heads, "max_position_embeddings": window}


def _attention(full: dict[str, Any], layers: int) -> dict[str, Any]:
    """The method, told to be small: see `Method.shrunk`."""
    small = attention_method(full).shrunk(LAYERS, layers)
    return {"name": small.name, **asdict(small)}


def _adapter(full: AdapterConfig) -> AdapterConfig:
    return replace(full, rank=min(full.rank, 4))
