"""A decoder trained on packed rows to predict the next token: pi, direct_ft, pretrain.

They differ in numbers only (conf/recipe); any attention method and rope scaling fits in.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from longctx.batch import Batch
from longctx.config import RunConfig
from longctx.data.loader import Change, packed
from longctx.data.store import Store, tokenizer_sha256
from longctx.errors import UserError
from longctx.models.load import architecture_of, load_model, local_tokenizer
from longctx.models.load import build_model as random_model
from longctx.models.lora import add_lora
from longctx.models.save_memory import spare
from longctx.recipe import Data, Recipe
from longctx.train.loss import chunked_cross_entropy


def build_model(run: RunConfig) -> nn.Module:
    """The decoder with its attention, rope scaling and adapters, on CPU."""
    _check(run)
    decoder = load_decoder(run)
    spare(decoder, run.parallel)
    decoder.train()
    return add_lora(decoder, run.adapter)


def _check(run: RunConfig) -> None:
    if run.encoder.name != "none" or run.contexts.count:
        raise UserError(f"recipe {run.name} trains a decoder alone: no encoder=, no contexts.count")


def load_decoder(run: RunConfig) -> Any:
    """The decoder with its attention and rope scaling, on CPU."""
    model = run.model
    if model.path is None:
        return random_model(model.architecture, run.attention, run.rope, run.train.dtype, run.seed)
    return load_model(model.path, run.attention, run.rope, run.train.dtype)


def sketch(run: RunConfig) -> Any:
    """The decoder on the meta device, with its adapters."""
    _check(run)
    decoder = sketch_decoder(run)
    spare(decoder, run.parallel)
    return add_lora(decoder.train(), run.adapter)


def sketch_decoder(run: RunConfig) -> Any:
    """The same for a recipe that joins something to the decoder."""
    architecture = run.model.architecture or architecture_of(str(run.model.path))
    return random_model(architecture, run.attention, run.rope, run.train.dtype, meta=True)


def build_data(run: RunConfig, change: Change | None = None) -> Data:
    """Packed rows of the stores; held-out rows in an order that no seed changes.

    Args:
        run: the run.
        change: what is done to each row, held-out ones too; see `longctx.data.loader.RowLoader`.
    """
    held_out = replace(run.data, store=run.data.held_out, weights=None, long_tokens=None)
    cut = partial(packed, micro_batch_rows=run.train.micro_batch_rows, change=change)
    rows, stores = run.train.batch_rows, open_stores(run, run.data.store)
    train = cut(stores, run.data, batch_rows=rows, seed=run.seed, name="data.store")
    if not held_out.store:
        return Data(train, None)
    rows, stores = run.train.eval_rows, open_stores(run, held_out.store)
    return Data(train, cut(stores, held_out, batch_rows=rows, seed=0, name="data.held_out"))


def open_stores(run: RunConfig, paths: Sequence[str]) -> list[Store]:
    """The token stores at `paths`.

    Raises:
        UserError: if one cannot be read, or was not made with the run's tokenizer.
    """
    stores = [Store(path) for path in paths]
    tokenizer = run.model.tokenizer_path
    if tokenizer is not None:
        sha = tokenizer_sha256(local_tokenizer(tokenizer))
        for store in stores:
            store.require_tokenizer(sha, tokenizer)
    return stores


def loss(run: RunConfig, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Next-token cross entropy over the scored labels: (sum, count)."""
    decoder = model.get_decoder()
    hidden = decoder(
        input_ids=batch.tokens, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    return chunked_cross_entropy(hidden, model.get_output_embeddings(), batch.labels)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Everything, or what the adapter left trainable."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


RECIPE = Recipe(
    build_model=build_model,
    build_data=build_data,
    loss=loss,
    trainable=trainable,
    sketch=sketch,
)
