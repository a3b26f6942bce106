"""Finds, checks and reads checkpoints; `writer.py` says what is in them.

Checking reads all of a checkpoint once, shared among the ranks that resume from it; weights are
then read one at a time, where they are needed.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from longctx.errors import UserError
from longctx.parallel.mesh import Mesh

INDEX = "checkpoint.json"
UNREADABLE = -1  # before the number of any file
Read = Callable[[], Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint on disk.

    Args:
        path: its directory.
        meta: the content of `checkpoint.json`.
    """

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.meta["step"])

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Each trained parameter's name with its weight and moments."""
        for file in self.meta["files"]:
            with safe_open(self.path / file, framework="pt") as shard:
                names = sorted({key.rpartition("/")[0] for key in shard.keys()})  # noqa: SIM118
                for name in names:
                    kinds = ("weight", "exp_avg", "exp_avg_sq")
                    yield name, {kind: shard.get_tensor(f"{name}/{kind}") for kind in kinds}

    def weights(self) -> dict[str, tuple[torch.Size, Read]]:
        """By trained parameter's name, its shape and what reads its fp32 weight."""
        found: dict[str, tuple[torch.Size, Read]] = {}
        for file in self.meta["files"]:
            shard: Any = safe_open(self.path / file, framework="pt")
            for key in shard.keys():  # noqa: SIM118
                name, _, kind = key.rpartition("/")
                if kind == "weight":
                    shape = torch.Size(shard.get_slice(key).get_shape())
                    found[name] = shape, partial(shard.get_tensor, key)
        return found


def file_check(path: Path) -> list[int]:
    """Size in bytes and CRC32."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return [path.stat().st_size, crc]


def open_checkpoint(path: Path, mesh: Mesh | None = None) -> Checkpoint:
    """The checkpoint in `path`, its files checked.

    Args:
        path: its directory.
        mesh: ranks that share the reading and get the same answer; the call is then collective.

    Raises:
        UserError: if it is not a checkpoint or is damaged.
    """
    ranks, rank = (mesh.ranks, mesh.rank) if mesh else (1, 0)
    faults: list[float] = []
    checks: dict[str, Any] = {}
    try:
        meta = json.loads((path / INDEX).read_text())
        checks = dict(meta["files"])
    except (OSError, ValueError, KeyError, TypeError):
        faults.append(UNREADABLE)
    files = list(checks)
    for number in range(rank, len(files), ranks):
        try:
            whole = file_check(path / files[number]) == checks[files[number]]
        except OSError:
            whole = False
        if not whole:
            faults.append(number)
    first = min(faults, default=math.inf)
    first = mesh.least(first) if mesh else first
    if first == UNREADABLE:
        raise UserError(f"{path} is not a checkpoint: it has no readable {INDEX}")
    if first < math.inf:
        raise UserError(f"{path / files[int(first)]} is damaged or missing")
    return Checkpoint(path, meta)


def steps(root: Path) -> list[str]:
    """Names of the checkpoints below `root`, the oldest first."""
    return sorted(path.name for path in root.glob("step_*[0-9]"))


def newest(root: Path, mesh: Mesh | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint below `root`, and a line for each newer one that is not.

    Args:
        root: a run's `checkpoints` directory.
        mesh: as `open_checkpoint` takes it.
    """
    problems: list[str] = []
    names = steps(root)
    for name in reversed(mesh.same(names) if mesh else names):  # a disk may show them late
        try:
            return open_checkpoint(root / name, mesh), problems
        except UserError as error:
            problems.append(str(error))
    return None, problems


def refuse_later(root: Path, resumed: Checkpoint, mesh: Mesh) -> None:
    """Raises UserError if `root` holds later steps than the checkpoint that a run resumes from.

    The run would write among them, and its next start could take one of them for its own.
    """
    later = [name for name in mesh.same(steps(root)) if name > f"step_{resumed.step:08d}"]
    if later:
        raise UserError(
            f"{root} holds later checkpoints ({later[0]}...) than {resumed.path}: take another "
            "run_dir, or resume=auto to resume from the newest"
        )


def fitting_weights(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Read]:
    """What reads a checkpoint's fp32 weights, by name.

    Raises:
        UserError: if `model` has no parameter of one's name and shape.
    """
    own, weights = dict(model.named_parameters()), checkpoint.weights()
    for name, (shape, _) in weights.items():
        if name not in own or own[name].shape != shape:
            raise UserError(f"{checkpoint.path} is of another model: it has {name} {list(shape)}")
    return {name: read for name, (_, read) in weights.items()}


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copies a checkpoint's weights into `model`, cast to its dtype.

    Raises:
        UserError: if the model has no parameter of that name and shape.
    """
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, read in fitting_weights(model, checkpoint).items():
            own[name].copy_(read())
