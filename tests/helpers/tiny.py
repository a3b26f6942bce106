"""Tiny runs for tests: the real configuration, shrunk; a store of random tokens."""

from pathlib import Path

import numpy as np

from longctx import cli
from longctx.config import RunConfig
from longctx.data.store import StoreWriter

VOCAB = 64
ARCHITECTURE = (
    "{model_type: llama, vocab_size: 64, hidden_size: 16, intermediate_size: 32,"
    " num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 4,"
    " max_position_embeddings: 32, tie_word_embeddings: %s, initializer_range: 0.02,"
    " rope_parameters: {rope_type: default, rope_theta: 10000.0}}"
)


def make_store(
    path: Path,
    seed: int = 0,
    documents: int = 40,
    longest: int = 90,
    tokenizer: str = "0" * 64,
    few: bool = False,
) -> Path:
    """A token store of random documents of 3 to `longest` tokens, of all or `few` of the ids."""
    random = np.random.default_rng(seed)
    about = {"tokenizer_sha256": tokenizer, "vocab_size": VOCAB, "bos_id": 1, "eos_id": 2}
    with StoreWriter(path, **about, source={"test": seed}) as store:
        for length in random.integers(3, longest, documents):
            store.add(np.array([1, *random.integers(4, 12 if few else VOCAB, length - 2), 2]))
    return path


def tiny_arguments(store: Path, run_dir: Path, *more: str, tied: bool = True) -> list[str]:
    """The command line of a tiny `recipe=pretrain`; `more` comes last and wins."""
    architecture = ARCHITECTURE % str(tied).lower()
    return [
        "recipe=pretrain",
        f"++model.architecture={architecture}",
        "model.tokenizer=null",
        f"data.store=['{store}']",
        f"data.held_out=['{store}']",
        "data.seq_len=32",
        "optim.lr=1e-2",
        "optim.warmup_steps=3",
        "train.max_steps=20",
        "train.batch_rows=8",
        "train.micro_batch_rows=1",
        "train.eval_every=0",
        "train.eval_rows=8",
        "train.save_every=0",
        "train.export_dtype=fp32",
        f"run_dir='{run_dir}'",
        "logger=none",
        *more,
    ]


def tiny_run(store: Path, run_dir: Path, *more: str, tied: bool = True) -> RunConfig:
    """The typed configuration of `tiny_arguments`."""
    arguments = tiny_arguments(store, run_dir, *more, tied=tied)
    return cli.compose(arguments, RunConfig, "train", "run_schema")
