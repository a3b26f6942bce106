"""The helper that follows the how-to pages: what is a file, what is a command, whose code runs."""

import pytest

from tests.helpers import how_to

PAGE = '''
Write a file:

```python title="longctx/new_file.py"
"""A docstring."""

WORD = "```"  # a fence inside a line ends nothing
```

```yaml title="conf/attention/full.yaml"
name: full
more: 1
```

```sh
python -c "import longctx.new_file as x; print(x.__file__, x.WORD)"
false
echo not reached
```

```text
whatever it prints
```
'''


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def test_blocks(page):
    found = how_to.blocks(page)
    assert [b.language for b in found] == ["python", "yaml", "sh", "text"]
    assert [b.path for b in found[2:]] == [None, None]
    assert how_to.commands(page) == [found[2].text]


def test_a_page_is_followed_in_a_copy(page, tmp_path, root):
    tree = how_to.copy_tree(tmp_path / "tree")
    assert (tree / "longctx" / "recipes").is_symlink()
    assert how_to.write_blocks(page, tree) == ["longctx/new_file.py", "conf/attention/full.yaml"]
    assert (tree / "conf/attention/full.yaml").read_text() == "name: full\nmore: 1\n"
    assert not (root / "longctx/new_file.py").exists()
    done = how_to.run(tree, how_to.commands(page)[0])
    assert done.stdout == f"{tree}/longctx/new_file.py ```\n" and done.returncode == 1
    with pytest.raises(AssertionError, match="import longctx"):
        how_to.succeed(tree, how_to.commands(page)[0])
    assert "tree" in how_to.succeed(tree, "pwd")


def test_a_page_stays_in_its_copy(tmp_path):
    path = tmp_path / "page.md"
    path.write_text('```sh title="../outside.sh"\necho\n```\n')
    with pytest.raises(AssertionError, match="outside"):
        how_to.write_blocks(path, tmp_path / "tree")
    path.write_text("no blocks\n")
    with pytest.raises(AssertionError, match="no block with a title"):
        how_to.write_blocks(path, tmp_path / "tree")
