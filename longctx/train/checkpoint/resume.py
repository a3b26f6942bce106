"""What a checkpoint and the run that resumes it must share; names what differs."""

import dataclasses
import json
from typing import Any

from longctx.config import RunConfig, build
from longctx.errors import UserError
from longctx.models.choose import attention_method
from longctx.train.checkpoint.reader import Checkpoint

# What may differ. Of the data the fingerprint says more than its settings: a store may move.
MAY_CHANGE = {
    "logger",
    "wandb",
    "resume",
    "dry_run",
    "force",
    "run_dir",
    "in_loop",
    "parallel",
    "data",
    "contexts",
}
MAY_CHANGE_IN_TRAIN = {
    "max_steps",
    "micro_batch_rows",
    "eval_every",
    "eval_rows",
    "save_every",
    "keep_last",
    "export_dtype",
    "save_async",
    "max_skipped",
    "skip_above",
}
NO_NUMBERS = {"family", "made_by"}  # of any group: where a path and its settings came from


def require_same(resumed: Checkpoint, run: RunConfig, fingerprint: dict[str, Any]) -> None:
    """Raises UserError if the checkpoint is of another model or of a run with other numbers.

    Args:
        resumed: the checkpoint.
        run: the run that resumes it.
        fingerprint: `checkpoint.fingerprint` of its model, and as `data` the loader's identity.
    """
    theirs = resumed.meta["fingerprint"]
    if theirs["trained"] != fingerprint["trained"]:
        raise UserError(f"{resumed.path} is of another model: trained parameters differ")
    if theirs["fixed"] != fingerprint["fixed"]:
        raise UserError(
            f"{resumed.path} was trained beside other frozen weights or rotary frequencies than "
            f"those of {run.model.path or run.model.name}"
        )
    if not isinstance(theirs["data"], dict):
        raise UserError(
            f"{resumed.path} was written by an earlier version, whose data cannot be compared: "
            "export it, or start in another run_dir"
        )
    if changed := _changes(theirs["data"], fingerprint["data"]):
        raise UserError(f"{resumed.path} was trained on other data: {changed}")
    old = build(RunConfig, resumed.meta["run"], str(resumed.path))
    if changed := _changes(_comparable(old), _comparable(run)):
        raise UserError(
            f"{resumed.path} comes from a run with other settings ({changed}): "
            "take another run_dir or the old settings"
        )
    if resumed.step > run.train.max_steps:
        raise UserError(
            f"{resumed.path} is at step {resumed.step}, beyond "
            f"train.max_steps={run.train.max_steps}"
        )


def _changes(then: dict[str, str], now: dict[str, str]) -> str:
    """`name: before -> after` of what differs; digests are shortened."""
    names = [name for name in {**now, **then} if then.get(name) != now.get(name)]
    sides = [(then.get(name, "none"), now.get(name, "none")) for name in names]
    return "; ".join(
        f"{name}: {_short(a)} -> {_short(b)}" for name, (a, b) in zip(names, sides, strict=True)
    )


def _short(value: str) -> str:
    return f"digest {value[:12]}" if len(value) == 64 else value  # of a SHA-256


def _comparable(run: RunConfig) -> dict[str, str]:
    """The settings that a resumed run must share, flat, as text."""
    kept = {k: v for k, v in dataclasses.asdict(run).items() if k not in MAY_CHANGE}
    kept["attention"] = {  # whether a number was given or is the method's default is all one
        "name": run.attention["name"],
        **dataclasses.asdict(attention_method(run.attention)),
    }
    kept["train"] = {k: v for k, v in kept["train"].items() if k not in MAY_CHANGE_IN_TRAIN}
    flat = {}
    for group, value in kept.items():
        for key, item in value.items() if isinstance(value, dict) else [("", value)]:
            if key not in NO_NUMBERS:
                flat[f"{group}.{key}".rstrip(".")] = json.dumps(item)
    return flat
