"""A copy of a checkpoint's weights in another dtype, for processes that share a machine.

Safetensors maps files into memory, so processes that load a checkpoint in the dtype it is stored in
share one copy; in another dtype each would hold a copy of its own. Casting the files once avoids
that. Costs reading and writing the weights once, and the memory of one file of them.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file

from longctx.errors import UserError
from longctx.models.files import FAILURES, cannot, locate

HEADER = {"format": "pt"}  # which transformers asks for
SMALL = 2**20  # bytes; smaller tensors stay as stored, since some are kept in fp32 on purpose
INDEX = "model.safetensors.index.json"


def stored_in(path: str) -> Path | None:
    """The directory of a checkpoint's safetensors; None: it has none, or not all of them.

    Args:
        path: a directory, a `.gguf` file or a hub name.

    Raises:
        UserError: if there is nothing at `path`.
    """
    where, gguf = locate(path)
    if gguf:
        return None
    try:
        config = cached_file(where, "config.json")
    except FAILURES as error:
        raise cannot("read the configuration of", path, error) from error
    if config is None:
        return None
    found = Path(config).parent
    files = _files(found)
    return found if files and all(file.is_file() for file in files) else None


def needs_cast(directory: Path, dtype: torch.dtype) -> int:
    """Bytes of a copy whose large floating-point weights are `dtype`; 0 if they are already.

    Args:
        directory: with safetensors; their headers are read.
        dtype: that is wanted.

    Raises:
        UserError: if a file cannot be read.
    """
    total, other = 0, False
    for file in _files(directory):
        with _opened(file) as shard:
            for name in shard.keys():  # noqa: SIM118
                part = shard.get_slice(name)
                numbers = torch.Size(part.get_shape()).numel()
                stored = _DTYPES.get(part.get_dtype())
                cast = stored is not None and _is_cast(numbers, stored)
                other = other or (cast and stored != dtype)
                total += numbers * (dtype.itemsize if cast or stored is None else stored.itemsize)
    return total if other else 0


def cast_copy(directory: Path, target: Path, dtype: torch.dtype) -> None:
    """Writes what `directory` holds of a model to `target`, large floating weights as `dtype`.

    Args:
        directory: with safetensors and a configuration.
        target: a directory that exists.
        dtype: of the copy.

    Raises:
        OSError: if it cannot be written.
        UserError: if a file cannot be read.
    """
    for file in sorted(directory.glob("*.json")):
        shutil.copyfile(file, target / file.name)
    for file in _files(directory):
        cast = {}
        with _opened(file) as shard:
            for name in shard.keys():  # noqa: SIM118
                weight = shard.get_tensor(name)
                large = _is_cast(weight.numel(), weight.dtype)
                cast[name] = weight.to(dtype) if large else weight
        try:
            save_file(cast, target / file.name, metadata=HEADER)
        except SafetensorError as error:  # as it calls a full disk
            raise OSError(str(error)) from error


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def _is_cast(numbers: int, stored: torch.dtype) -> bool:
    return stored in _DTYPES.values() and numbers * stored.itemsize >= SMALL


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def _files(directory: Path) -> list[Path]:
    """The files that transformers reads: one, or those of an index."""
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    try:
        named = set(json.loads((directory / INDEX).read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return sorted(directory / str(name) for name in named)
