"""A user's mistake ends the process with one line and exit code 2."""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from longctx.cli import places
from longctx.errors import UserError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Ends the process with 2 and one line if the body raises something the user can fix."""
    try:
        yield
    except BrokenPipeError:  # `... | head` has read enough
        os._exit(1)
    except (UserError, HydraException, OmegaConfBaseException, OSError) as error:
        if (
            isinstance(error, OSError)
            and not isinstance(error, HydraException)  # a missing choice is both
            and error.errno not in FULL_DISK
        ):
            raise
        line = one_line(error)
        if _first_to(f"report {line}"):
            sys.stdout.flush()
            print(f"error: {line}", file=sys.stderr, flush=True)
        os._exit(2)  # a rank must not wait for others in some library's exit handler


def _first_to(deed: str) -> bool:
    """Whether this rank is the first to do `deed`; without torch there is no group to ask."""
    if "torch" not in sys.modules:
        return os.environ.get("RANK", "0") == "0"
    from longctx.parallel.mesh import first_to

    return first_to(deed)


def one_line(error: Exception) -> str:
    """The sentence of an error that may have many lines."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException):
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={name} is not one of {', '.join(error.options or [])}"
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read as KEY=VALUE (quote special characters)"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no default: give {error.full_key}=VALUE"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return _unknown_key(cause)
    if group_asked := re.match(r"You must specify '(\w+)'", str(error)):
        group = group_asked[1]
        return f"{group}= is missing: give one of {', '.join(places.choices(group))}"
    text = str(cause if isinstance(cause, UserError) else error)
    if isinstance(cause, ValidationError):
        text = f"{text.removeprefix('Error merging override ')}: {str(cause).splitlines()[0]}"
    lines = [" ".join(x.split()) for x in text.splitlines()]
    lines = [x for x in lines if x and not x.startswith(("object_type=", "reference_type="))]
    return "; ".join(lines)


def _unknown_key(error: ConfigAttributeError | ConfigKeyError) -> str:
    """The key that does not exist, beside those that do."""
    group = str(error.full_key).rpartition(".")[0]
    known = sorted(str(key) for key in error.parent_node or () if key != "hydra")
    line = f"{error.full_key} is not a setting: {group or 'there'} has {', '.join(known) or 'none'}"
    free = error.parent_node is not None and OmegaConf.get_type(error.parent_node) is dict
    return f"{line}; +{error.full_key}=VALUE adds it" if group and free else line
