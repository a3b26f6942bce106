"""CEPE's encoder, trained from random weights to predict masked tokens: cepe_mlm.

The run's model is the decoder that the encoder is for; only its tokenizer is used.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from longctx.batch import Batch
from longctx.config import DataConfig, RunConfig
from longctx.data.context_loader import Stores, windowed
from longctx.data.loader import RowLoader
from longctx.data.masks import MaskTokens
from longctx.errors import UserError
from longctx.models.cepe import chosen_encoder
from longctx.models.load import load_tokenizer
from longctx.models.save_memory import spare
from longctx.recipe import Data, Recipe
from longctx.recipes.causal_lm import open_stores, trainable
from longctx.train.loss import chunked_cross_entropy


def build_model(run: RunConfig) -> Any:
    """The encoder with its head, on CPU."""
    _check(run)
    encoder: Any = chosen_encoder.build(run.encoder, run.train.dtype, run.seed)
    chosen_encoder.require_window(encoder, run.data.seq_len, "data.seq_len")
    spare(encoder, run.parallel)
    return encoder.train()


def sketch(run: RunConfig) -> Any:
    """The encoder on the meta device."""
    _check(run)
    encoder = chosen_encoder.sketch(run.encoder, run.train.dtype)
    chosen_encoder.require_window(encoder, run.data.seq_len, "data.seq_len")
    spare(encoder, run.parallel)
    return encoder.train()


def _check(run: RunConfig) -> None:
    names = (run.attention["name"], run.rope.name, run.adapter.name)
    if names != ("full", "none", "none"):
        raise UserError(f"recipe {run.name} trains an encoder: no attention=, rope= or adapter=")


def build_data(run: RunConfig) -> Data:
    """Rows of one joined stream; rows and masks of the held-out data are the same for all seeds."""
    held_out = replace(run.data, store=run.data.held_out, weights=None)
    return Data(
        train=_loader(run, run.data, run.train.batch_rows, run.seed, "data.store"),
        held_out=_loader(run, held_out, run.train.eval_rows, 0, "data.held_out")
        if held_out.store
        else None,
    )


def _loader(run: RunConfig, data: DataConfig, rows: int, seed: int, name: str) -> RowLoader:
    if data.mask_rate is None or run.contexts.count:
        raise UserError(f"recipe {run.name} needs data.mask_rate and no contexts.count")
    stores = Stores(name, open_stores(run, data.store), data.weights)
    return windowed(
        stores,
        stores,
        data,
        run.contexts,
        batch_rows=rows,
        micro_batch_rows=run.train.micro_batch_rows,
        seed=seed,
        change=MaskTokens(data.mask_rate, _mask_id(run, stores), _special(run, stores), seed),
    )


def _mask_id(run: RunConfig, stores: Stores) -> int:
    """The id of the mask token: behind the last of the tokenizer."""
    size = int(stores.stores[0].meta["vocab_size"])
    own = run.encoder.architecture.get("vocab_size", size + 1)
    if own != size + 1:
        raise UserError(
            f"encoder.architecture.vocab_size={own} must be {size + 1}: {stores.name} has tokens "
            f"below {size}, and the mask token is one more"
        )
    return size


def _special(run: RunConfig, stores: Stores) -> tuple[int, ...]:
    """Ids that are never masked."""
    ids = {int(s.meta[key]) for s in stores.stores for key in ("bos_id", "eos_id")}
    tokenizer = run.model.tokenizer_path
    if tokenizer is not None:
        ids |= set(load_tokenizer(tokenizer).all_special_ids)
    return tuple(sorted(ids))


def loss(run: RunConfig, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy of the hidden tokens: (sum, count)."""
    hidden = model.hidden_for_head(batch.tokens, None, batch.positions)
    return chunked_cross_entropy(hidden, model.get_output_embeddings(), batch.labels)


def tiny(run: RunConfig, seq_len: int, vocab_size: int) -> dict[str, Any]:
    """A small encoder."""
    return {"encoder": chosen_encoder.tiny(run.encoder, seq_len, vocab_size)}


RECIPE = Recipe(
    build_model=build_model,
    build_data=build_data,
    loss=loss,
    trainable=trainable,
    sketch=sketch,
    tiny=tiny,
    reads_weights=False,  # the decoder's tokenizer alone
)
