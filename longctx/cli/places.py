"""Where choices are found: `conf/` of the package, and folders that `--config-dir` adds.

An installed package brings `conf/` along, but not the small model and the data of the repository:
there `${root:}` is the current directory.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from longctx.config import ModelConfig
from longctx.errors import UserError

PACKAGE = Path(__file__).resolve().parent.parent
ROOT = PACKAGE.parent
CONF = PACKAGE / "conf"
LAB = ("assets", "data")  # what `${root:}` is for
FLAGS = ("--config-dir", "-cd")
ADDED: list[Path] = []  # a user's folders of choices, from the last command line that was read


def in_checkout() -> bool:
    """Whether longctx runs from its repository, where the lab model and its data are."""
    return (ROOT / "pyproject.toml").is_file() and (ROOT / "train.py").is_file()


def root() -> Path:
    """What `${root:}` stands for: the repository, or the current directory if installed."""
    return ROOT if in_checkout() else Path.cwd()


def split(arguments: Sequence[str]) -> tuple[list[str], list[Path]]:
    """The arguments without `--config-dir DIR`, and those directories.

    Args:
        arguments: of the command line, without the program's name.
    """
    kept, folders, given = list[str](), list[Path](), iter(arguments)
    for argument in given:
        flag, mark, value = argument.partition("=")
        if flag in FLAGS:
            value = value if mark else next(given, "")
            folders.append(Path(value).resolve())
        else:
            kept.append(argument)
    return kept, folders


def flags(folders: Sequence[Path]) -> list[str]:
    """The arguments that add those folders."""
    return [part for folder in folders for part in (FLAGS[0], str(folder))]


def use(folders: Sequence[Path]) -> None:
    """Adds a user's folders of choices, and the Python modules beside them, behind longctx's own.

    Raises:
        UserError: if one is not a directory.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--config-dir {folder} is not a directory")
        if str(folder.parent) not in sys.path:
            sys.path.append(str(folder.parent))
    ADDED[:] = folders


def choices(group: str, folder: Path = CONF) -> list[str]:
    """The names in a group, a user's among them.

    Args:
        group: a folder below `folder`.
        folder: longctx's own.
    """
    return sorted({p.stem for place in (folder, *ADDED) for p in (place / group).glob("*.yaml")})


def says(group: str, name: str, key: str) -> Any:
    """What a choice says about a key, itself or by what it is based on; None: nothing.

    Args:
        group: its group.
        name: of the choice.
        key: at the top of its YAML.
    """
    for place in (CONF, *ADDED):
        path = place / group / f"{name}.yaml"
        if path.is_file():
            found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            if key in found:
                return found[key]
            bases = [x for x in found.get("defaults", []) if isinstance(x, str) and x != "_self_"]
            told = (says(group, base, key) for base in reversed(bases))
            return next((value for value in told if value is not None), None)
    return None


def require_model(model: ModelConfig) -> None:
    """Raises UserError for a model of the repository where the package alone is installed."""
    for path in (model.path, model.tokenizer):
        if _left_behind(path):
            raise UserError(
                f"model={model.name} needs {Path(str(path)).relative_to(root())} of longctx's "
                "repository, which is not installed with the package: give model=PATH"
            )


def require_data(stores: Sequence[str]) -> None:
    """Raises UserError for data of the repository where the package alone is installed."""
    for path in stores:
        if _left_behind(path):
            raise UserError(
                f"{Path(path).relative_to(root())} is data of longctx's repository, which is not "
                "installed with the package: give data=store data.store=[DIR,...], token stores "
                "that longctx prepare makes"
            )


def _left_behind(path: str | None) -> bool:
    """Whether `${root:}` would have found it in a checkout."""
    if path is None or in_checkout() or Path(path).exists():
        return False
    return Path(path).is_relative_to(root()) and Path(path).relative_to(root()).parts[0] in LAB
