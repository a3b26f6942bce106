"""Writes checkpoints that any ZeRO stage and number of ranks can resume, complete or not at all.

`checkpoints/step_00000100/` holds one safetensors file per rank (that rank's share of the trained
parameters: fp32 weight and both Adam moments, whole) and `checkpoint.json`. Everything is written
into a `.tmp` directory, flushed to the disk, and renamed by rank 0 when all ranks are done; a
directory with the final name is therefore complete, and its checksums show later damage.
12 bytes per trained parameter; a rank holds its share in memory while it writes.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from longctx.errors import UserError
from longctx.parallel.mesh import Mesh
from longctx.train.checkpoint.reader import INDEX, file_check

CHECK = ".check"  # ends the name of a file's checksum, until all files are written
OTHERS = "another rank failed"


def fingerprint(model: nn.Module) -> dict[str, str]:
    """What must be the same on resume: trained names and shapes, frozen weights, buffers.

    Reads every frozen weight once (some GB/s). Taken before an engine may shard the weights.
    """
    shapes, frozen = [], 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shapes.append(f"{name}{tuple(parameter.shape)}")
        else:
            frozen = _crc(parameter, frozen)
    for _, buffer in model.named_buffers():
        frozen = _crc(buffer, frozen)
    trained = zlib.crc32(" ".join(sorted(shapes)).encode())
    return {"trained": f"{trained:08x}", "fixed": f"{frozen:08x}"}


def _crc(tensor: Tensor, start: int) -> int:
    raw = tensor.detach().cpu().contiguous().view(torch.uint8)
    return zlib.crc32(raw.reshape(-1).numpy().data, start)


def save(
    root: Path,
    step: int,
    state: Iterator[tuple[str, dict[str, Tensor]]],
    about: dict[str, Any],
    mesh: Mesh,
) -> Path:
    """Writes `root/step_XXXXXXXX` and waits for it. Collective.

    Args:
        root: the run's `checkpoints` directory.
        step: optimizer steps taken.
        state: `Engine.state()`.
        about: JSON-able facts to keep with it: configuration, fingerprint, tokens seen.
        mesh: the ranks; each writes an equal share of the parameters.

    Raises:
        SaveError: if a rank cannot write; then nothing is left of it.
    """
    partial = place(root, step).with_suffix(".tmp")
    failure = failure_of(lambda: shutil.rmtree(partial)) if mesh.main and partial.exists() else None
    all_or_none(partial, failure, mesh)
    mine = share(state, mesh)
    all_or_none(partial, failure_of(lambda: write_share(partial, mine, mesh)), mesh)
    failure = None
    if mesh.main:
        failure = failure_of(lambda: publish(partial, {"step": step, **about}, mesh.ranks))
    all_or_none(partial, failure, mesh)
    return place(root, step)


class SaveError(UserError):
    """A checkpoint could not be written; earlier ones are as they were."""


def place(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is or would be."""
    return root / f"step_{step:08d}"


def share(
    state: Iterator[tuple[str, dict[str, Tensor]]], mesh: Mesh, copy: bool = False
) -> dict[str, Tensor]:
    """What this rank writes, on CPU: about as many numbers as the others. Collective.

    Args:
        state: `Engine.state()`.
        mesh: the ranks.
        copy: into memory of its own, which the next step does not change.
    """
    mine: dict[str, Tensor] = {}
    shares = [0] * mesh.ranks
    for key, values in state:
        owner = shares.index(min(shares))
        shares[owner] += values["weight"].numel()
        if owner == mesh.rank:
            mine |= {
                f"{key}/{kind}": value.to("cpu", torch.float32, copy=copy).contiguous()
                for kind, value in values.items()
            }
        del values  # one parameter at a time on the device
    return mine


def failure_of(write: Callable[[], object]) -> str | None:
    """Why `write` failed, or None."""
    try:
        write()
    except (OSError, SafetensorError, ValueError) as error:
        return str(error)
    return None


def all_or_none(partial: Path, failure: str | None, mesh: Mesh) -> None:
    """Raises SaveError and removes the directory unless all ranks could write. Collective."""
    if not mesh.sum(failure is not None):
        return
    if mesh.main:
        shutil.rmtree(partial, ignore_errors=True)
    mesh.barrier()
    raise SaveError(f"{partial.with_suffix('')} could not be written: {failure or OTHERS}")


def write_share(partial: Path, mine: dict[str, Tensor], mesh: Mesh) -> None:
    """Writes a rank's file and its checksum to the disk.

    Raises:
        OSError, SafetensorError: if it cannot be written.
        ValueError: if it holds a number that is not finite: that is no state to go on from.
    """
    for key, value in mine.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{key} is not finite")
    partial.mkdir(parents=True, exist_ok=True)
    path = partial / _file(mesh.rank, mesh.ranks)
    save_file(mine, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    _write_json(path.with_suffix(CHECK), file_check(path))


def publish(partial: Path, about: dict[str, Any], ranks: int) -> None:
    """Adds the index and gives the directory its final name, once all ranks have written.

    Raises:
        OSError: if it cannot.
    """
    files = [_file(rank, ranks) for rank in range(ranks)]
    notes = [(partial / file).with_suffix(CHECK) for file in files]
    checks = [json.loads(note.read_text()) for note in notes]
    _write_json(partial / INDEX, {**about, "files": dict(zip(files, checks, strict=True))})
    for note in notes:
        note.unlink()
    _sync_directory(partial)
    final = partial.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync_directory(final.parent)


def _file(rank: int, ranks: int) -> str:
    return f"state_{rank:05d}_of_{ranks:05d}.safetensors"


def _write_json(path: Path, value: object) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """Puts the names in a directory on the disk, so that a crash of the machine keeps them."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def prune(root: Path, step: int, keep_last: int) -> None:
    """Deletes all but the newest `keep_last` checkpoints up to `step`; 0 keeps all.

    Later ones do not count: they are damaged, or the run would have resumed from them.
    """
    found = sorted(p for p in root.glob("step_*[0-9]") if p.name <= f"step_{step:08d}")
    for old in found[:-keep_last] if keep_last else []:
        shutil.rmtree(old, ignore_errors=True)  # the rest is deleted the next time
