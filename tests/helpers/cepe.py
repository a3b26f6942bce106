"""Tiny CEPE runs: the real recipes, shrunk, beside a decoder of random weights."""

from pathlib import Path

from longctx import cli
from longctx.config import RunConfig
from longctx.models.export.directory import export
from longctx.models.load import build_model

VOCAB = 64
DECODER = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
ENCODER = (
    "{vocab_size: 65, hidden_size: 12, intermediate_size: 24, num_hidden_layers: 2,"
    " num_attention_heads: 2, max_position_embeddings: 32, rms_norm_eps: 1.0e-6,"
    " rope_theta: 10000.0, initializer_range: 0.2}"
)
SHAPES = {
    "cepe_mlm": ["data.seq_len=16"],
    "cepe_warmup": ["data.seq_len=16", "contexts.count=2", "contexts.size=8"],
    "cepe": ["data.seq_len=16", "contexts.count=3", "contexts.size=8"],
    "ceped": ["data.seq_len=16", "contexts.count=2", "contexts.size=8"],
}


def make_decoder(path: Path, tokenizer: Path, seed: int = 0, **changes: int) -> Path:
    """A decoder of random weights as a directory; `tokenizer` is one too."""
    return export(build_model(DECODER | changes, seed=seed), str(tokenizer), path)


def cepe_arguments(recipe: str, decoder: Path, store: Path, run_dir: Path, *more: str) -> list[str]:
    """The command line of a tiny run of one of these recipes; `more` comes last and wins."""
    start = ["cepe.start=null"] if recipe != "cepe_mlm" else []
    return [
        f"recipe={recipe}",
        f"model='{decoder}'",
        "encoder.path=null",
        f"++encoder.architecture={ENCODER}",
        *start,
        *SHAPES[recipe],
        "data=store",
        f"data.store=['{store}']",
        f"data.held_out=['{store}']",
        "optim.lr=1e-2",
        "optim.warmup_steps=0",
        "optim.schedule=constant",
        "parallel.activation_checkpointing=false",
        "train.max_steps=4",
        "train.batch_rows=8",
        "train.micro_batch_rows=2",
        "train.dtype=fp32",
        "train.eval_every=0",
        "train.eval_rows=8",
        "train.save_every=0",
        f"run_dir='{run_dir}'",
        "logger=none",
        *more,
    ]


def cepe_run(recipe: str, decoder: Path, store: Path, run_dir: Path, *more: str) -> RunConfig:
    """The typed configuration of `cepe_arguments`."""
    arguments = cepe_arguments(recipe, decoder, store, run_dir, *more)
    return cli.compose(arguments, RunConfig, "train", "run_schema")
