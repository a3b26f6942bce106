"""CEPED: CEPE for a chat model, distilled from the same model with full attention.

The teacher is the same frozen decoder over [context ; input] without cross-attention, computed on
line or stored before. Held-out rows always use it on line.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from longctx.batch import Batch
from longctx.config import RunConfig, TeacherConfig
from longctx.data.stored_teacher import StoredTeacher
from longctx.errors import UserError
from longctx.models.configure import native_window
from longctx.recipe import Data, Recipe
from longctx.recipes import cepe
from longctx.recipes.causal_lm import trainable
from longctx.train.distill import chunked_distillation, decoder_digest, teacher_of


def build_model(run: RunConfig) -> nn.Module:
    """CEPE's model, whose decoder alone is the teacher."""
    model: Any = cepe.build_model(run)
    window, rows = native_window(model.get_decoder().config), run.row_tokens
    if rows > window:
        raise UserError(
            f"the teacher reads contexts and row in one, {rows:,} tokens, and the window of "
            f"{run.model.name} has {window:,}: lower contexts.count or data.seq_len"
        )
    if run.teacher.source == "stored" and Path(str(run.teacher.store)).exists():
        # An export needs no teacher; `build_data` requires it for training.
        _stored(run).require_model(decoder_digest(model))
    built: nn.Module = model
    return built


def build_data(run: RunConfig) -> Data:
    """CEPE's rows; with a stored teacher, each training row with its distributions."""
    if run.contexts.mask or run.contexts.repeat:
        raise UserError(
            f"recipe {run.name}: teacher and student see the same contexts, so contexts.mask=0 "
            "and contexts.repeat=false"
        )
    if run.teacher.source == "online":
        return cepe.build_data(run)
    stored = _stored(run)
    data = cepe.build_data(run, stored.with_teacher)
    stored.require_rows(data.train.identity)
    return data


def _stored(run: RunConfig) -> StoredTeacher:
    stored = StoredTeacher(str(run.teacher.store))
    stored.require(
        rows=run.train.max_steps * run.train.batch_rows,
        seq_len=run.data.seq_len,
        top_k=run.kl.top_k,
        temperature=run.kl.temperature,
    )
    return stored


def loss(run: RunConfig, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy and divergence from the teacher over the row's own tokens."""
    teacher = teacher_of(model, batch)
    hidden = model.hidden_states(batch.tokens, batch.positions, batch.contexts)
    head = model.get_output_embeddings()
    return chunked_distillation(hidden, teacher, head, batch.labels, run.kl)


def tiny(run: RunConfig, seq_len: int, vocab_size: int) -> dict[str, Any]:
    """CEPE's, with a teacher on line that keeps few tokens."""
    kl = replace(run.kl, top_k=min(run.kl.top_k, vocab_size // 4))
    return {**cepe.tiny(run, seq_len, vocab_size), "kl": kl, "teacher": TeacherConfig()}


RECIPE = Recipe(
    build_model=build_model,
    build_data=build_data,
    loss=loss,
    trainable=trainable,
    sketch=cepe.sketch,
    tiny=tiny,
    distils=True,
)
