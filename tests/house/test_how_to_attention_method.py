"""docs/how-to/attention-method.md, followed to the letter in a copy of the tree."""

import json
import re

import pytest

from tests.helpers import how_to

PAGE = "docs/how-to/attention-method.md"
FILE = "longctx/attention/sliding_blocks.py"
CONF = "conf/attention/sliding_blocks.yaml"
EXAMPLE = "tests/examples/attention/sliding_blocks.yaml"
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def tree(tmp_path_factory, root):
    place = how_to.copy_tree(tmp_path_factory.mktemp("method") / "tree")
    written = how_to.write_blocks(root / PAGE, place)
    assert [path for path in written if not path.startswith("my_text/")] == [
        FILE, CONF, EXAMPLE, "docs/methods/sliding_blocks.md",
    ]  # fmt: skip
    return place


@pytest.fixture(scope="module")
def printed(tree, root):
    """What each block of commands printed."""
    return [how_to.succeed(tree, block) for block in how_to.commands(root / PAGE)]


def test_the_shared_tests_find_it_and_it_passes(printed):
    passed = re.search(r"(\d+) passed", printed[0])
    assert passed and int(passed[1]) > 150 and "failed" not in printed[0]


def test_it_trains_and_is_measured(printed, tree):
    lines = [*map(json.loads, (tree / "outputs/sliding/metrics.jsonl").read_text().splitlines())]
    assert [line["step"] for line in lines] == [1, 2]
    record = json.loads((tree / "outputs/sliding/hf/config.json").read_text())["longctx_attention"]
    assert record == {"name": "sliding_blocks", "block_size": 16, "blocks": 2}
    assert (tree / "outputs/sliding/hf/longctx_attention_sliding_blocks.py").is_file()
    assert "sliding_blocks" in next((tree / "outputs/sliding_report").glob("*.md")).read_text()


def test_the_house_rules_hold(printed, tree):
    rules = [f"tests/house/test_{rule}.py" for rule in ("names", "words", "settings")]
    tests = " ".join([*rules, "tests/unit/cli/test_arguments.py"])
    how_to.succeed(tree, how_to.python(f"-m pytest -q -p no:cacheprovider {tests}"))
    how_to.succeed(tree, f"ruff check {FILE} && ruff format --check {FILE}")


# What is written otherwise in the file that computes; None: nothing, but there is no example.
WRONG = {
    "seen_too_early": ("begin = max(", "begin = -1 + max(1, "),  # a key too many
    "seen_too_late": ("self.blocks + 1) * self.block_size - first, 0)", "self.blocks) * 9, 0)"),
    "first_forgotten": ("self.block_size - first, n)", "self.block_size, n)"),
    "wrong_count": ("return past + 1 - gone", "return past - gone"),
    "not_shrunk": ("return replace(self, block_size=4)", "return replace(self)"),
    "no_example": None,
}


def test_a_wrong_method_fails_with_the_four_files_alone(printed, tree):
    files = {path: (tree / path).read_text() for path in (FILE, CONF, EXAMPLE)}
    files[EXAMPLE] = "".join(files[EXAMPLE].splitlines(keepends=True)[:2])  # one set is enough
    for name, change in WRONG.items():
        for path, right in files.items():
            text = right
            if change is not None and path == FILE:
                assert right.count(change[0]) == 1, change
                text = right.replace(*change)
            if change is not None or path != EXAMPLE:
                own = tree / path.replace("sliding_blocks", name)
                own.write_text(text.replace("name: sliding_blocks", f"name: {name}"))
    chosen = " or ".join(WRONG)
    shared = "tests/unit/attention/test_methods.py"
    tests = f"-m pytest -q --tb=line -p no:cacheprovider {shared} -k '{chosen}'"
    done = how_to.run(tree, how_to.python(tests))
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    for name in WRONG:
        assert [line for line in failed if f"[{name}" in line or f"-{name}" in line], name
    assert "tests/examples/attention/no_example.yaml is missing" in done.stdout
