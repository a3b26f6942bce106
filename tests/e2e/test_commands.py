"""`longctx COMMAND`: what is in longctx/commands is a command, and says what it does in a line."""

import os
import subprocess
import sys

import pytest

from longctx.__main__ import commands, help_text
from tests.helpers.entry import run_entry
from tests.helpers.process import ROOT

HEAVY = ("torch", "transformers", "deepspeed")


def longctx(*arguments: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, and on stderr also what it imports."""
    return subprocess.run(
        [sys.executable, "-m", "longctx", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
    )  # fmt: skip


def heavy(done: subprocess.CompletedProcess) -> list[str]:
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    return [name for name in HEAVY if name in imported]


def test_help_has_a_line_for_every_command():
    found = commands()
    assert set(found) == {p.stem for p in (ROOT / "longctx/commands").glob("[!_]*.py")}
    assert {"train", "evaluate", "generate", "prepare", "plan", "parity", "verify"} <= set(found)
    for name, words in found.items():
        assert words.endswith(".") and len(words) < 100, f"the docstring of commands/{name}.py"
        assert f"  {name} " in help_text() and words in help_text()
    done = longctx()
    assert done.returncode == 0 and done.stdout.strip() == help_text() and heavy(done) == []


@pytest.mark.parametrize("name", ["train", "evaluate", "generate"])
def test_a_script_is_the_command(name, tmp_path):
    script = run_entry(["--help"], tmp_path / "log", script=f"{name}.py")
    command = longctx(name, "--help")
    assert (command.returncode, command.stdout) == (0, script.out)


@pytest.mark.parametrize(
    "arguments",
    [["train", "recipe=nope"], ["train", "--help"], ["plan", "recipe=nope"], ["plan", "--help"],
     ["generate", "model=nope"], ["parity", "short=maybe"], ["prepare", "--help"]],
)  # fmt: skip
def test_help_and_mistakes_do_not_wait_for_torch(arguments):
    done = longctx(*arguments)
    assert heavy(done) == []
    if "--help" in arguments:
        assert done.returncode == 0 and done.stdout
    else:
        assert done.returncode == 2 and "\nerror: " in done.stderr and done.stdout == ""


def test_an_unknown_command_is_one_line():
    done = longctx("trian")
    assert done.returncode == 2 and done.stdout == ""
    line = f"error: longctx trian is not a command: give one of {', '.join(commands())}"
    assert done.stderr.splitlines()[-1] == line


def test_deepspeed_may_put_the_rank_before_the_command():
    """`deepspeed --module longctx train ...` starts `longctx --local_rank=0 train ...`."""
    done = longctx("--local_rank=0", "train", "recipe=nope")
    assert done.returncode == 2 and "error: recipe=nope is not one of" in done.stderr
