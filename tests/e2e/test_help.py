"""`--help` of every entry point: teaches, lists the choices, needs no other argument."""

from pathlib import Path

import pytest

from tests.helpers.entry import run_entry
from tests.helpers.process import ROOT

ENTRY_POINTS = [p for p in ("train.py", "evaluate.py", "generate.py") if (ROOT / p).exists()]


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("script", [*ENTRY_POINTS, "data_prep/filter_redpajama.py"])
def test_help(script: str, flag: str, tmp_path: Path) -> None:
    done = run_entry([flag], tmp_path / "log", script=script)
    assert (done.code, done.err) == (0, "")
    assert Path(script).name in done.out and "$" not in done.out
    folder = ROOT / "conf" / ("attention" if "data_prep" not in script else "data_prep/executor")
    for name in sorted(p.stem for p in folder.glob("*.yaml")):
        assert name in done.out
