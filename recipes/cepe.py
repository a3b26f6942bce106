"""CEPE: a frozen decoder learns to read contexts through an encoder: cepe_warmup, cepe.

They differ in numbers only (conf/recipe): the warm-up's contexts are the row's own tokens.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from longctx.batch import Batch
from longctx.config import RunConfig
from longctx.data.context_loader import Stores, few, windowed
from longctx.data.loader import Change, in_turn
from longctx.data.masks import MaskContexts
from longctx.errors import UserError
from longctx.models.cepe import chosen_encoder
from longctx.models.cepe.model import CepeForCausalLM
from longctx.models.configure import native_window
from longctx.models.save_memory import spare
from longctx.recipe import Data, Recipe
from longctx.recipes.causal_lm import load_decoder, open_stores, sketch_decoder, trainable
from longctx.train.checkpoint.start_from import require_same_tokenizer, take_added
from longctx.train.loss import chunked_cross_entropy
from longctx.train.optim import freeze_all_but


def build_model(run: RunConfig) -> nn.Module:
    """The decoder, frozen, with encoder and cross-attention beside it, on CPU."""
    _check(run)
    require_same_tokenizer(run.model.tokenizer_path, [run.encoder.path, run.cepe.start])
    fresh = run.cepe.start is None  # else all its weights are about to come from there
    encoder = chosen_encoder.build(run.encoder, run.train.dtype, run.seed, weights=fresh)
    model: Any = _join(run, load_decoder(run), encoder)
    if run.cepe.start is not None:
        take_added(model, run.cepe.start)
    return _ready(run, model)


def sketch(run: RunConfig) -> nn.Module:
    """The model on the meta device."""
    _check(run)
    decoder, encoder = sketch_decoder(run), chosen_encoder.sketch(run.encoder, run.train.dtype)
    with torch.device("meta"):
        return _ready(run, _join(run, decoder, encoder))


def _check(run: RunConfig) -> None:
    if run.encoder.name == "none":
        raise UserError(f"recipe {run.name} needs an encoder: give encoder=CHOICE")
    if run.adapter.name != "none":
        raise UserError(f"recipe {run.name} leaves the decoder as it is: no adapter=")


def _join(run: RunConfig, decoder: Any, encoder: Any) -> Any:
    chosen_encoder.require_window(encoder, run.contexts.size, "contexts.size")
    window, kind = native_window(decoder.config), decoder.config.rope_parameters["rope_type"]
    # Other attentions, and dynamic rope, read beyond the window that a model claims.
    if run.data.seq_len > window and run.attention["name"] == "full" and kind != "dynamic":
        raise UserError(
            f"data.seq_len={run.data.seq_len} is beyond the window of {run.model.name}, {window} "
            f"tokens, and recipe {run.name} leaves the decoder as it is: lower it"
        )
    return CepeForCausalLM.from_parts(
        decoder, encoder, cross_layers=run.cepe.layers, init=run.cepe.init, seed=run.seed
    )


def _ready(run: RunConfig, model: Any) -> nn.Module:
    spare(model, run.parallel)
    model.train()
    freeze_all_but(model, model.added_parameters(run.cepe.train_encoder))
    frozen: nn.Module = model
    return frozen


def build_data(run: RunConfig, change: Change | None = None) -> Data:
    """Rows with contexts, changed by `change` too; held-out rows are the same for every seed."""
    data, contexts = run.data, run.contexts
    if not contexts.count or data.mask_rate is not None:
        raise UserError(f"recipe {run.name} needs contexts.count above 0 and no data.mask_rate")
    documents = Stores("data.store", open_stores(run, data.store), data.weights)
    stream = documents
    if contexts.stream_store:
        paths = open_stores(run, contexts.stream_store)
        stream = Stores("contexts.stream_store", paths, contexts.stream_weights)
    hide = MaskContexts(contexts.mask, contexts.mask_whole, run.seed) if contexts.mask else None
    micro = run.train.micro_batch_rows
    cut = partial(windowed, data=data, contexts=contexts, micro_batch_rows=micro)
    held_out = None
    if data.held_out:
        read = Stores("data.held_out", open_stores(run, data.held_out), None)
        held_out = cut(read, read, batch_rows=run.train.eval_rows, seed=0)
    seed, rows = run.seed, run.train.batch_rows
    train = cut(documents, stream, batch_rows=rows, seed=seed, change=in_turn(hide, change))
    return Data(train, held_out)


def loss(run: RunConfig, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Next-token cross entropy of the decoder's own tokens; contexts are never scored."""
    hidden = model.hidden_states(batch.tokens, batch.positions, batch.contexts, batch.context_mask)
    return chunked_cross_entropy(hidden, model.get_output_embeddings(), batch.labels)


def tiny(run: RunConfig, seq_len: int, vocab_size: int) -> dict[str, Any]:
    """Few contexts and a small encoder; an output projection of zeros would hide gradients."""
    return {
        "contexts": few(run.contexts, seq_len),
        "encoder": chosen_encoder.tiny(run.encoder, seq_len, vocab_size),
        "cepe": replace(run.cepe, start=None, init="normal", layers=run.cepe.layers and 2),
    }


RECIPE = Recipe(build_model, build_data, loss, trainable, sketch, tiny=tiny)
