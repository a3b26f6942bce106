"""The names of a sweep's points: what the sweep varies, and nothing else.

So a point keeps its directory when the same command is given again, whatever its number.
"""

import hashlib
import os
import re

from hydra.core.override_parser.overrides_parser import OverridesParser

from longctx.errors import UserError

LONGEST = 100  # characters


def name_points(arguments: list[str]) -> list[str]:
    """What a sweep adds to its command line, so that what is fixed stays out of the names.

    Args:
        arguments: of the command line, without the program's name.

    Raises:
        UserError: if a launcher started this process, or `run_dir` or a dry run is given.
    """
    if "RANK" in os.environ:
        raise UserError(
            "a sweep (-m) starts the processes of its jobs itself: "
            "python train.py -m ... hydra.launcher.nproc=N"
        )
    given = [a for a in arguments if not a.startswith("-")]
    overrides = OverridesParser.create().parse_overrides(given)
    keys = [x.key_or_group for x in overrides if not x.is_hydra_override()]
    if "run_dir" in keys:
        raise UserError(
            "run_dir= is the directory of one run: those of a sweep (-m) are below "
            "hydra.sweep.dir=DIR"
        )
    if any(x.key_or_group == "dry_run" and x.value() not in (False,) for x in overrides):
        raise UserError("a sweep has no dry run: give one point without -m")
    swept = {x.key_or_group for x in overrides if x.is_sweep_override()}
    fixed = ",".join(f"'{key}'" for key in keys if key not in swept)
    return [f"hydra.job.config.override_dirname.exclude_keys=[{fixed}]"]


def point_name(overrides: str) -> str:
    """A directory's name for a point of a sweep: its overrides, short and without odd characters.

    Args:
        overrides: as `hydra.job.override_dirname` has them.

    >>> point_name("optim.lr-1e-05+recipe-pi")
    'optim.lr-1e-05+recipe-pi'
    >>> point_name("model.path-'/models/a'+seed-1")
    'model.path-models_a+seed-1-d7e14ba8'
    """
    plain = re.sub(r"[^\w.+-]+", "_", overrides.replace("'", ""), flags=re.ASCII)
    plain = plain.replace("-_", "-")
    if plain == overrides and len(plain) <= LONGEST:
        return plain or "point"
    return f"{plain[:LONGEST]}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"
