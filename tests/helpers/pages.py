"""The code of the documentation: blocks of Python to run, command lines to compose.

A command line counts wherever a page has it: in a `sh` block, an indented block, or in backticks
with settings. Capital words stand for what a reader has: `PATH`, `DIR`.
"""

import argparse
import contextlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from longctx import cli
from longctx.cli import chain
from tests.helpers.tree import ROOT, found, text

BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n+)?```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
STARTS = ("python ", "deepspeed ", "torchrun ", "longctx ", "sbatch ", "bash ", "make ", "NODES=")
INLINE = re.compile(r"`((?:python|deepspeed|torchrun|longctx|sbatch|NODES=\d+) [^`\n]+)`")
RUNS = re.compile(r"\S+\.(?:py|sbatch|sh)|-m|longctx")
LAUNCHED = {"launch/slurm.sbatch": "train.py", "launch/torchrun.sh": "train.py"}
LEFT_OUT = {"...", "[...]"}
REST = {  # what "..." on a command line stands for, where nothing else is said
    "train": ["recipe=pi", "data.store=[A,B,C,D,E,F,G]"],
    "evaluate": ["model=lab", "out=out", "held_out=STORE", "tasks=[perplexity]", "lengths=[256]"],
}
STAND_INS = {'"cuda"': '"cpu"'}  # and "PATH", which is the lab model


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
        page: path of the page from the root.
        language: after the fence.
        code: between the fences.
        reason: why it is not run, in the words of the page; None: it is run.
    """

    page: str
    language: str
    code: str
    reason: str | None


@dataclass(frozen=True)
class Command:
    """A command line of a page.

    Args:
        page: path of the page from the root.
        line: as it is printed, on one line.
    """

    page: str
    line: str


def pages() -> list[str]:
    """Every page whose code is held to this; `docs/how-to/` is followed whole by its own tests."""
    every = [*found("*.md"), *found("docs/**/*.md"), *found("assets/**/*.md")]
    return [p for p in every if not p.startswith(("docs/how-to/", "docs/reports/", "CHANGELOG"))]


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page that have a language."""
    return [Block(page, m["language"], m["code"], m["reason"]) for m in BLOCK.finditer(text(page))]


def commands(page: str) -> list[Command]:
    """The command lines of a page, in order, each once."""
    whole = text(page)
    fenced = re.findall(r"^```sh\n(.*?)^```$", whole, re.MULTILINE | re.DOTALL)
    unfenced = re.sub(r"^```.*?^```$", "", whole, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^    .*$", unfenced, re.MULTILINE)
    lines = [*joined("\n".join(fenced)), *joined("\n".join(indented))]
    inline = [c for c in INLINE.findall(whole) if "=" in c and "..." not in c]
    found_lines = [line for line in lines if line.startswith(STARTS)] + inline
    return [Command(page, line) for line in dict.fromkeys(found_lines)]


def joined(code: str) -> list[str]:
    """The lines of a block, with continued lines made one."""
    lines = re.sub(r"\\\n\s*", "", code).splitlines()
    return [" ".join(line.split()) for line in lines]


def words(line: str) -> list[str]:
    """The arguments of a command line: without comment, redirection and what follows a pipe."""
    out: list[str] = []
    for word in shlex.split(line, comments=True):
        if word in {"|", "&&", ";", "&"} or word.startswith((">", "2>")):
            break
        out.append(word)
    return out


def target(line: str) -> tuple[str, list[str]] | None:
    """What a command line starts (`train.py`, `longctx.plan`, `longctx`) and its arguments.

    Returns:
        None for what is not Python of this project: `make test`, `bash lab/corpus.sh`.
    """
    given = words(line)
    for i, word in enumerate(given):
        if word in LAUNCHED:
            return LAUNCHED[word], given[i + 1 :]
        if word == "-m" and given[i - 1].startswith("python") and given[i + 1 : i + 2]:
            module = given[i + 1]
            return (module, given[i + 2 :]) if module.startswith("longctx") else None
        if word == "longctx":
            return "longctx", given[i + 1 :]
        if word.endswith(".py"):
            return word, given[i + 1 :]
    return None


class Composed(Exception):  # noqa: N818 - not an error
    """Everything that a command would run with has been read."""


def compose(line: str, folder: Path) -> bool:
    """Reads a command line as its program would, and stops before anything is done.

    Args:
        line: of a page.
        folder: an empty one, which is the working directory meanwhile.

    Returns:
        Whether it is a command of this project that reads arguments.

    Raises:
        Exception: what the program would have refused it with.
    """
    aimed = target(line)
    if aimed is None:
        return False
    name, arguments = aimed
    if {"--help", "-h"} & set(arguments):
        return False
    path = ROOT / name
    if name.endswith(".py"):
        source = text(name)  # a page that names a script which is not there fails here
        if name.startswith(("lab/pages/", "benchmarks/")) or not re.search(
            r"cli\.run\(|parse_args\(|import main", source
        ):
            return False
    for one in _points([_substituted(a) for a in arguments if a not in LEFT_OUT]):
        with _stopped(name, one, bool(LEFT_OUT & set(arguments)), folder), pytest.raises(Composed):
            if name.endswith(".py"):
                runpy.run_path(str(path), run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=False)
    return True


def _substituted(argument: str) -> str:
    """The argument with a real model where a page has a capital word or a run of its own."""
    key, mark, value = argument.partition("=")
    names = {Path(p).stem for p in found("conf/model/*.yaml")}
    if key == "model" and not {*value.split(",")} <= names and not (ROOT / value).exists():
        return f"model={ROOT / 'assets/lab-llama'}"
    return f"{key}{mark}4" if re.fullmatch(r"N(\+1)?", value) else argument


def _points(arguments: list[str]) -> list[list[str]]:
    """The first and the last point of a sweep; else the arguments alone."""
    if not {"-m", "--multirun"} & set(arguments):
        return [arguments]
    kept = [a for a in arguments if a not in {"-m", "--multirun"} and not a.startswith("hydra")]
    listed = [_choices(a) for a in kept]
    return [[values[end] for values in listed] for end in (0, -1)]


def _choices(argument: str) -> list[str]:
    """`key=a,b` as `key=a` and `key=b`; commas inside brackets separate nothing."""
    key, _, value = argument.partition("=")
    if re.match(r"\w+\(", value):  # interval(...): only a sweeper can read it
        return [f"{key}=1e-5"]
    return [f"{key}={v}" for v in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", value)]


@contextlib.contextmanager
def _stopped(name: str, arguments: list[str], partly: bool, folder: Path) -> Iterator[None]:
    """Programs stop once they have read their arguments; their errors are raised as they are."""

    def run(
        task: Any, schema: type, config: str, schema_name: str, place: Path = cli.CONF, **_: Any
    ) -> None:
        given = {a.lstrip("+~").partition("=")[0] for a in sys.argv[1:]}
        rest = REST.get(config, []) if partly else []
        added = [a for a in rest if a.partition("=")[0] not in given]
        cli.compose([*sys.argv[1:], *added], schema, config, schema_name, place)
        raise Composed

    def chained(stages: Any, launch: Any) -> None:
        assert len(stages) > 1  # they were composed to find out what is missing
        raise Composed

    def parsed(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
        _, unknown = argparse.ArgumentParser.parse_known_args(self, args, namespace)
        assert unknown == []
        raise Composed

    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setattr(cli, "run", run)
        patch.setattr(chain, "train", chained)
        patch.setattr(cli, "mistakes_in_one_line", contextlib.nullcontext)
        patch.setattr(argparse.ArgumentParser, "parse_args", parsed)
        patch.setattr(sys, "argv", [name, *arguments])
        yield


def runnable(block: Block) -> str:
    """The code of a block with the lab model for `"PATH"`, on this machine's device."""
    code = block.code.replace('"PATH"', repr(str(ROOT / "assets/lab-llama")))
    for printed, real in STAND_INS.items():
        code = code.replace(printed, real)
    return code
