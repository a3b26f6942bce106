"""Every script in examples/ runs as it is, and shows what it claims."""

import re
import runpy
import sys

import pytest

from tests.helpers.tree import ROOT, found

EXAMPLES = found("examples/*.py")


def run(path, capsys, monkeypatch, folder):
    """Runs a script from another folder, without arguments; what it printed."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(ROOT / path)])
    runpy.run_path(str(ROOT / path), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("path", EXAMPLES)
def test_an_example_runs(path, capsys, monkeypatch, tmp_path):
    assert run(path, capsys, monkeypatch, tmp_path).strip()


def test_dca_reads_beyond_the_window(capsys, monkeypatch, tmp_path):
    out = run("examples/extend_and_generate.py", capsys, monkeypatch, tmp_path)
    pattern = r"^(\S.*?) +perplexity of the last 256 tokens +([\d.]+)"
    worth = {name: float(value) for name, value in re.findall(pattern, out, re.MULTILINE)}
    assert worth["attention=dca"] < 0.7 * worth["plain attention"]
    assert len(worth) == 3
