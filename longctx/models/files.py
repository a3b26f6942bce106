"""Reading model files: where they are, in which dtype, weights checked, one line for a failure.

All readers of models and tokenizers share this; it knows none of them. Nothing is unpickled but
what `torch.load(weights_only=True)` reads.
"""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from longctx.errors import UserError

# What transformers raises for files or values it cannot use.
FAILURES = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Dtype = str | torch.dtype | None


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype by its short name, `fp32 | bf16`, or as it is.

    Raises:
        UserError: if the name is another one.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def locate(path: str) -> tuple[str, dict[str, Any]]:
    """Where transformers should look, and its arguments for a `.gguf` file."""
    local = Path(path).expanduser()
    if local.is_dir():
        return str(local), {}
    if local.is_file() and local.suffix == ".gguf":
        return str(local.parent), {"gguf_file": local.name}
    if local.is_file():
        raise UserError(f"{path} is neither a model directory nor a .gguf file")
    if path.endswith(".gguf") or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"{path} does not exist")
    return path, {}


def cannot(action: str, path: str, error: BaseException) -> UserError:
    """One line of an error that transformers spreads over many."""
    words = " ".join(str(error).split())
    return UserError(f"cannot {action} {path}: {words[:300]}")


def load_checked(
    kind: Any,
    path: str | Path,
    config: PreTrainedConfig,
    dtype: Dtype,
    safe: bool,
    renamed: dict[str, str] | None = None,
) -> Any:
    """A model of a class, from a directory or a hub name, or one line that says what is wrong.

    Costs one reading of the weights.

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
            dtype="auto" if dtype is None else as_dtype(dtype),
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
    require_all(info, path)
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        raise UserError(
            f"{path} is of another model than its configuration: {name} is {list(stored)} there, "
            f"and heads and sizes make it {list(wanted)}"
        )
    return model


def require_all(info: Mapping[str, Any], path: str | Path) -> None:
    """Raises UserError if weights were missing or unknown.

    Args:
        info: what `from_pretrained(output_loading_info=True)` says.
        path: where they were read, for the message.
    """
    unknown = [k for k in info["unexpected_keys"] if not k.endswith("rotary_emb.inv_freq")]
    for keys, fault in ((info["missing_keys"], "lacks"), (unknown, "has the unknown")):
        if keys:
            raise UserError(f"{path} {fault} weights {sorted(keys)[:3]} ({len(keys)} in all)")
