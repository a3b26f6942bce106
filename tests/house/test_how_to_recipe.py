"""docs/how-to/recipe.md, followed to the letter in a copy of the tree."""

import ast
import json

import pytest

from tests.helpers import how_to

pytestmark = pytest.mark.long

PAGE = "docs/how-to/recipe.md"


@pytest.fixture(scope="module")
def tree(tmp_path_factory, root):
    place = how_to.copy_tree(tmp_path_factory.mktemp("recipe") / "tree")
    how_to.write_blocks(root / PAGE, place)
    for block in how_to.commands(root / PAGE):
        how_to.succeed(place, block)
    return place


SCORED = """
import numpy as np
from longctx import cli
from longctx.batch import IGNORE
from longctx.config import RunConfig
from longctx.models.load import load_tokenizer
from longctx.recipe import find_recipe

arguments = ["recipe=answers_only", "model=lab", "data.store=[data/answers]", "data.seq_len=64"]
run = cli.compose(arguments, RunConfig, "train", "run_schema")
decode, found = load_tokenizer("assets/lab-llama").decode, []
for batch in find_recipe(run.builder).build_data(run).train.step(0, 0, 1):
    for labels in batch.labels:
        ids = labels.numpy()
        borders = np.flatnonzero(np.diff(np.r_[False, ids != IGNORE, False]))
        found += [decode(ids[a:b]) for a, b in borders.reshape(-1, 2)]
print(sorted(set(found)))
"""


def test_the_page_trains(tree):
    lines = (tree / "outputs/answers/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert (tree / "outputs/answers/hf/config.json").is_file()


def test_answers_alone_are_scored(tree):
    (tree / "scored.py").write_text(SCORED)
    found = how_to.succeed(tree, how_to.python("scored.py"))
    answers = [" 48213\nDone.", " Anne Anne Henry Paul\nDone.", " Ruth\nDone."]
    assert ast.literal_eval(found) == sorted(answers)
