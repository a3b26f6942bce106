"""docs/how-to/corpus.md, followed to the letter in a copy of the tree."""

import json

import pytest

from tests.helpers import how_to

pytestmark = pytest.mark.long

PAGE = "docs/how-to/corpus.md"


def test_the_page_trains(tmp_path, root):
    tree = how_to.copy_tree(tmp_path / "tree")
    how_to.write_blocks(root / PAGE, tree)
    said = [how_to.succeed(tree, block) for block in how_to.commands(root / PAGE)]
    assert "data.store[0]: 2 documents" in said[-1] and "data.store[1]: 2 documents" in said[-1]
    assert json.loads((tree / "data/mine/summary.json").read_text())
    lines = [json.loads(x) for x in (tree / "outputs/mine/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and "eval_loss" in lines[-1]
