"""A how-to page followed to the letter: files into a copy of the tree, commands run there.

The convention of the pages in `docs/how-to/`: a block whose info string has a title is a whole
file, and a `sh` block without one is run from the root of the copy.

    ```python title="longctx/attention/mine.py"      a file
    ```yaml title="conf/attention/mine.yaml"         a file
    ```sh                                            commands
    ```text                                          neither: what a command prints
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.process import BIN, ROOT

BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LEFT_OUT = {"__pycache__", ".git", ".venv", "outputs", "data", "wandb"}  # without git to ask


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
        language: first word of its info string.
        path: of the file that it is, from the root of the tree; None: it is no file.
        text: what stands between the fences.
    """

    language: str
    path: str | None
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [Block(language, path or None, text) for language, path, text in found]


def copy_tree(place: Path) -> Path:
    """The repository as git sees it, edited and new files too, in the new directory `place`."""
    for name in _files():
        source, target = ROOT / name, place / name
        if not os.path.lexists(source):
            continue  # deleted, and not committed yet
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
    return place


def _files() -> list[str]:
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        return [name for name in done.stdout.split("\0") if name]
    paths = [p for p in ROOT.rglob("*") if p.is_symlink() or p.is_file()]
    names = [p.relative_to(ROOT) for p in paths]
    return [str(name) for name in names if not LEFT_OUT.intersection(name.parts)]


def write_blocks(page: Path, tree: Path) -> list[str]:
    """Writes the files of a page into a copy of the tree.

    Args:
        page: with at least one file.
        tree: what `copy_tree` made.

    Returns:
        Their paths from the root, in order. Files that exist are replaced.
    """
    written = []
    for block in blocks(page):
        if block.path is None:
            continue
        target = tree / block.path
        assert target.resolve().is_relative_to(tree.resolve()), block.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(block.text, encoding="utf-8")
        written.append(block.path)
    assert written, f"{page.name} has no block with a title"
    return written


def commands(page: Path) -> list[str]:
    """The `sh` blocks of a page, in order."""
    return [b.text for b in blocks(page) if b.language == "sh" and b.path is None]


def run(tree: Path, command: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs commands of a shell from the root of a copy, on the copy's own code.

    Args:
        tree: the copy.
        command: one or several lines; the first that fails ends them.
        seconds: limit.

    Returns:
        With `returncode`, `stdout` and `stderr`; the caller says what it expects.
    """
    drop = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTEST_ADDOPTS")
    env = {k: v for k, v in os.environ.items() if k not in drop}
    env |= {"PATH": f"{BIN}:{env['PATH']}", "PYTHONPATH": str(tree)}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=tree, env=env, check=False, capture_output=True, text=True, timeout=seconds,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def succeed(tree: Path, command: str, seconds: float = 300) -> str:
    """`run`, and fails with the last lines of output unless it ends well.

    Returns:
        What it printed.
    """
    done = run(tree, command, seconds)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def python(script: str) -> str:
    """A command line of this Python, for `run`: `python("train.py recipe=pi")`."""
    return f"{sys.executable} {script}"
