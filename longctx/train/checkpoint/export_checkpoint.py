"""From a checkpoint to a directory that `AutoModelForCausalLM.from_pretrained` loads.

One process, no engine: builds the run's model again from its own configuration, loads the
checkpoint's weights into it, and saves it. Needs memory for one copy of the weights. Training does
this for the last checkpoint, `longctx export CHECKPOINT DIRECTORY` for any other.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from longctx.config import RunConfig, build
from longctx.models.export.directory import export
from longctx.models.files import DTYPES
from longctx.models.lora import merge_lora
from longctx.train.checkpoint.reader import load_weights, open_checkpoint


def checkpoint_model(
    path: Path, build_model: Callable[[RunConfig], nn.Module]
) -> tuple[nn.Module, RunConfig]:
    """The model of a checkpoint, adapters merged, in evaluation mode; and its run.

    Args:
        path: a `checkpoints/step_XXXXXXXX` directory.
        build_model: the recipe's.

    Raises:
        UserError: if the checkpoint is damaged or of another version.
    """
    checkpoint = open_checkpoint(path)
    run = build(RunConfig, checkpoint.meta["run"], str(path))
    model = build_model(run)
    load_weights(model, checkpoint)
    model = merge_lora(model)
    model.eval()
    return model, run


def export_checkpoint(
    path: Path, build_model: Callable[[RunConfig], nn.Module], directory: Path
) -> Path:
    """Writes the checkpoint at `path` as a Hugging Face directory; replaces an older export.

    Args:
        path: a `checkpoints/step_XXXXXXXX` directory.
        build_model: the recipe's.
        directory: where to write.
    """
    model: Any
    model, run = checkpoint_model(path, build_model)
    model.to(DTYPES[run.train.export_dtype])
    return export(model, run.model.tokenizer_path, directory)
