"""Names: one for a method everywhere, one meaning for a file's name, nothing listed by hand."""

import ast
from collections import defaultdict
from pathlib import Path

from tests.helpers.tree import BESIDE, PRODUCT, found, sources, tree

METHODS = {Path(p).stem for p in found("conf/attention/*.yaml")}
RECIPES = {Path(p).stem for p in found("conf/recipe/*.yaml")}
ROPES = {Path(p).stem for p in found("conf/rope/*.yaml")}
MACHINERY = {"__init__", "method"}  # of attention/: the contract; everything else there is a method
WITHOUT_PAGE = {"full"}  # plain attention needs no explanation
PUBLIC = ("longctx/config/", "longctx/commands/", "longctx/eval/tasks/", "recipes/")


def test_a_method_has_its_yaml_and_its_file():
    code = {Path(p).stem for p in found("longctx/attention/*.py")} - MACHINERY
    assert {f"conf/attention/{stem}.yaml is missing" for stem in code - METHODS} == set()
    assert {f"longctx/attention/{stem}.py is missing" for stem in METHODS - code} == set()


def test_a_method_has_its_page():
    pages = {Path(p).stem for p in found("docs/methods/*.md")}
    bare = {
        stem for stem in (METHODS | {"pi"}) - WITHOUT_PAGE
        if not {stem, stem.split("_", maxsplit=1)[0]} & pages  # or the page of its family
    }  # fmt: skip
    assert bare == set(), "docs/methods/NAME.md is missing"


def test_a_basename_means_one_thing():
    """`config/X.py` has the settings of X and `commands/X.py` is the command X: public names."""
    places = defaultdict(list)
    for path in sources("longctx", "recipes", "data_prep"):
        if not Path(path).name.startswith("__") and not path.startswith(PUBLIC):
            places[Path(path).name].append(path)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_no_file_is_named_utils():
    vague = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    ours = sources(*PRODUCT, *BESIDE, "tests")
    assert [path for path in ours if Path(path).name in vague] == []


def test_the_trainer_knows_no_method():
    names = (METHODS | RECIPES | ROPES | {"longgen"}) - WITHOUT_PAGE - {"none"}
    compared = {
        f"{path}: {inner.value}"
        for path in sources("longctx/train")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Compare | ast.MatchValue)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Constant) and inner.value in names
    }
    assert compared == set()


def _listed(node: ast.AST) -> set[str]:
    """The strings that a literal list, tuple, set or dict (its keys) names."""
    if isinstance(node, ast.Dict):
        parts = [key for key in node.keys if key is not None]
    elif isinstance(node, ast.List | ast.Tuple | ast.Set):
        parts = node.elts
    else:
        return set()
    return {str(p.value) for p in parts if isinstance(p, ast.Constant)}


def test_nothing_found_by_its_place_is_listed_by_hand():
    """A method, a recipe, a task is a file in its folder; a second list of them goes stale."""
    tasks = {Path(p).stem for p in found("longctx/eval/tasks/*.py")} - {"__init__"}
    listed = [
        f"{path}:{getattr(node, 'lineno', 0)} lists {sorted(names & kind)}"
        for path in sources(*PRODUCT)
        for node in ast.walk(tree(path))
        if (names := _listed(node))
        for kind in (METHODS, RECIPES, tasks)
        if len(names & kind) > 2
    ]
    assert listed == []


def test_a_list_is_seen():
    (node,) = ast.parse("a = {'dca': 1, 'full': 2, **b}").body
    assert _listed(node.value) == {"dca", "full"}
