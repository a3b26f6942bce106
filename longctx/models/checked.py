"""Weights into a model class, with nothing missing, unknown or of another shape; else one line.

Nothing is unpickled but what `torch.load(weights_only=True)` reads. Costs one reading of the
weights.
"""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from transformers import PreTrainedConfig

from longctx.errors import UserError
from longctx.models.choose import FAILURES, Dtype, cannot, locate
from longctx.models.load import _dtype


def load_checked(
    kind: Any,
    path: str | Path,
    config: PreTrainedConfig,
    dtype: Dtype,
    safe: bool,
    renamed: dict[str, str] | None = None,
) -> Any:
    """A model of a class, from a directory or a hub name.

    Args:
        kind: a class with transformers' `from_pretrained`.
        path: where the weights are.
        config: of the model.
        dtype: `fp32 | bf16` or a torch dtype. None: the weights' own.
        safe: only safetensors; else a `.bin` of tensors is read where there are none.
        renamed: patterns of stored names and what stands for them here.

    Raises:
        UserError: if weights cannot be read, or are not those of the configuration.
    """
    where, gguf = locate(str(path))
    if gguf:
        raise UserError(f"{path}: a {kind.__name__} is a directory, not a .gguf file")
    try:
        loaded: Any = kind.from_pretrained(
            where,
            config=config,
            dtype="auto" if dtype is None else _dtype(dtype),
            use_safetensors=True if safe else None,
            key_mapping=renamed,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    except UserError:
        raise
    except UnpicklingError as error:
        raise UserError(f"{path} holds more than tensors in a .bin, which is not opened") from error
    except FAILURES as error:
        raise cannot("load the weights of", str(path), error) from error
    model, info = loaded
    unknown = [k for k in info["unexpected_keys"] if not k.endswith("rotary_emb.inv_freq")]
    for keys, fault in ((info["missing_keys"], "lacks"), (unknown, "has the unknown")):
        if keys:
            raise UserError(f"{path} {fault} weights {sorted(keys)[:3]} ({len(keys)} in all)")
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        raise UserError(
            f"{path} is of another model than its configuration: {name} is {list(stored)} there, "
            f"and heads and sizes make it {list(wanted)}"
        )
    return model
