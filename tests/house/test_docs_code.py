"""The code of the documentation works: Python blocks run, programs take the command lines.

A block that cannot run here says why in the line before it: `<!-- not run: needs a GPU -->`. It
must still compile.
"""

import sys
from itertools import pairwise

import pytest

from longctx.plan import __main__ as plan
from tests.helpers import pages

pytestmark = pytest.mark.long

PAGES = pages.pages()
PYTHON = [p for p in PAGES if any(b.language == "python" for b in pages.blocks(p))]
COMMANDS = [p for p in PAGES if pages.commands(p)]


# A plan and what the page says that it prints.
PLANS = [
    pytest.param(pages.words(lines[0]), said.code, id=f"{page}: {lines[0][13:60]}")
    for page in PAGES
    for asked, said in pairwise(pages.blocks(page))
    if asked.language == "sh" and said.language == "text"
    and len(lines := pages.joined(asked.code)) == 1 and lines[0].startswith("longctx plan ")
]  # fmt: skip


def test_something_is_found():
    assert "README.md" in PYTHON
    assert len(PLANS) >= 4
    assert sum(len(pages.commands(page)) for page in PAGES) > 50


@pytest.mark.parametrize("page", PYTHON)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """In order, and as one session: a page goes on with what it made above."""
    monkeypatch.chdir(tmp_path)
    session = {"__name__": "a_page"}
    for block in pages.blocks(page):
        if block.language == "python":
            code = compile(pages.runnable(block), f"{page}: {block.code.splitlines()[0]}", "exec")
            if block.reason is None:
                exec(code, session)


@pytest.mark.parametrize("page", COMMANDS)
def test_command_lines_are_read(page, tmp_path):
    wrong = {}
    for command in pages.commands(page):
        try:
            pages.compose(command.line, tmp_path)
        except (Exception, SystemExit) as error:
            wrong[command.line] = f"{type(error).__name__}: {error}"
    assert wrong == {}
    assert list(tmp_path.iterdir()) == [], "a command did something"


@pytest.mark.parametrize(("command", "said"), PLANS)
def test_plans_print_what_a_page_says(command, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", command[1:])
    plan.main()
    printed = {line.strip() for line in capsys.readouterr().out.splitlines()}
    assert [x for x in map(str.strip, said.splitlines()) if x and x not in printed] == []


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("deepspeed --num_gpus 2 train.py recipe=pi  # note", ("train.py", ["recipe=pi"])),
        ("python -m longctx.plan gpus=8 >plan.txt", ("longctx.plan", ["gpus=8"])),
        ("longctx plan gpus=8 | head", ("longctx", ["plan", "gpus=8"])),
        ("torchrun -m longctx train recipe=pi", ("longctx", ["train", "recipe=pi"])),
        ("sbatch launch/slurm.sbatch recipe=pi", ("train.py", ["recipe=pi"])),
        ("python -m pytest tests", None),
        ("make test", None),
    ],
)
def test_what_a_command_line_starts(line, target):
    assert pages.target(line) == target


@pytest.mark.parametrize(
    "line",
    [
        "python train.py recipe=no_such_recipe",
        "python train.py recipe=pi train.no_such_key=1",
        "python train.py -m recipe=pi,no_such_recipe",
        "python evaluate.py model=PATH lengths=[256] tasks=[no_such_task] out=DIR",
        "python -m longctx.plan recipe=pi gpus=many",
        "python data_prep/stats.py STORES --no-such-flag",
        "python no_such_script.py",
    ],
)
def test_a_command_line_that_is_wrong_is_seen(line, tmp_path):
    with pytest.raises((Exception, SystemExit)):
        pages.compose(line, tmp_path)


def test_a_command_line_that_is_right_is_read(tmp_path):
    assert pages.compose("python train.py -m recipe=pi,dca_ft optim.lr=1e-5,2e-5", tmp_path)
    assert pages.compose("python data_prep/stats.py STORES --output STORES", tmp_path)
    assert pages.compose("python evaluate.py ... parallel_sp=4", tmp_path)
    assert not pages.compose("make test", tmp_path)
