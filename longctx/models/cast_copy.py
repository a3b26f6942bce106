"""A checkpoint's weights once more on disk, in another dtype: for processes that share a machine.

Safetensors maps files into memory, so processes that load a checkpoint in the dtype it is stored in
share one copy. In another dtype each gets a copy of its own. Casting it once avoids that. Costs one
reading and one writing of the weights, and the memory of one file of them.
"""

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
from longctx.models.choose import FAILURES, cannot, locate

HEADER = {"format": "pt"}  # which transformers asks for


def stored_in(path: str) -> Path | None:
    """The directory of a checkpoint's safetensors; None: it has none (a `.gguf` file, `.bin`).

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
    found = None if config is None else Path(config).parent
    return found if found and any(found.glob("*.safetensors")) else None


def needs_cast(directory: Path, dtype: torch.dtype) -> int:
    """Bytes of a copy in `dtype`; 0 if all weights are stored so.

    Args:
        directory: with safetensors; their headers are read.
        dtype: that is wanted.

    Raises:
        UserError: if a file cannot be read.
    """
    numbers, kinds = 0, set()
    for file in _files(directory):
        with _opened(file) as shard:
            for name in shard.keys():  # noqa: SIM118
                part = shard.get_slice(name)
                kinds.add(part.get_dtype())
                numbers += torch.Size(part.get_shape()).numel()
    return 0 if kinds <= {_NAMES[dtype]} else numbers * dtype.itemsize


def cast_copy(directory: Path, target: Path, dtype: torch.dtype) -> None:
    """Writes what `directory` holds of a model to `target`, floating-point weights as `dtype`.

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
                cast[name] = weight.to(dtype) if weight.is_floating_point() else weight
        try:
            save_file(cast, target / file.name, metadata=HEADER)
        except SafetensorError as error:  # as it calls a full disk
            raise OSError(str(error)) from error


_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))
