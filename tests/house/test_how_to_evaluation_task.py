"""docs/how-to/evaluation-task.md, followed to the letter in a copy of the tree."""

import json

import pytest

from tests.helpers import how_to

pytestmark = pytest.mark.long

PAGE = "docs/how-to/evaluation-task.md"


def test_the_page_evaluates(tmp_path, root):
    tree = how_to.copy_tree(tmp_path / "tree")
    written = how_to.write_blocks(root / PAGE, tree)
    assert not any((root / path).exists() for path in written), "the page adds what is not there"
    shared, own, report = (how_to.succeed(tree, block) for block in how_to.commands(root / PAGE))
    assert " passed" in shared and "failed" not in shared and "2 passed" in own
    assert "\n  echo " in report, "--help lists it"
    assert "## Echo" in report and "echo at 128 (inside the window), nats" in report
    results = json.loads((tree / "outputs/echo/results.json").read_text())
    cells = results["tasks"]["echo"]["result"]["cells"]
    assert [cell["length"] for cell in cells] == [64, 128]
    assert (tree / "outputs/echo/echo.png").is_file()
