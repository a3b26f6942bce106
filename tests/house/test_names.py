"""Names: one for a method everywhere, one meaning for a file's name, nothing listed by hand."""

import ast
from collections import defaultdict
from pathlib import Path

from tests.helpers.tree import BESIDE, PRODUCT, Function, found, sources, tree

METHODS = {Path(p).stem for p in found("conf/attention/*.yaml")}
RECIPES = {Path(p).stem for p in found("conf/recipe/*.yaml")}
ROPES = {Path(p).stem for p in found("conf/rope/*.yaml")}
MACHINERY = {"__init__", "method"}  # of attention/: the contract; everything else there is a method
WITHOUT_PAGE = {"full"}  # plain attention needs no explanation
CONTRACTS = ("longctx/attention/method.py", "longctx/recipe.py", "longctx/eval/task.py")
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


def _members(path: str) -> set[str]:
    """Public functions and fields of the classes in a file."""
    classes = [node for node in tree(path).body if isinstance(node, ast.ClassDef)]
    members = {
        inner.name if isinstance(inner, Function) else ast.unparse(inner.target)
        for node in classes
        for inner in node.body
        if isinstance(inner, Function | ast.AnnAssign)
    }
    return {name for name in members if not name.startswith("_")}


def _asked_for(node: ast.AST) -> str | None:
    """The attribute whose presence `hasattr(x, "name")` or `getattr(x, "name", default)` tests."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return None
    tests = node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)
    name = node.args[1] if tests else None
    return name.value if isinstance(name, ast.Constant) else None


def test_a_contract_is_a_class():
    """Each member of a contract has a documented default: nobody asks whether it is there."""
    members = set().union(*map(_members, CONTRACTS))
    assert {"definition", "for_window", "build_model", "inputs"} <= members
    asked = [
        f"{path}:{getattr(node, 'lineno', 0)} asks for {name}"
        for path in sources(*PRODUCT)
        for node in ast.walk(tree(path))
        if (name := _asked_for(node)) in members
    ]
    assert asked == []


def test_a_question_for_a_member_is_seen():
    questions = ast.parse("hasattr(x, 'seen'); getattr(x, 'seen', 1); getattr(x, 'seen'); seen(x)")
    assert [_asked_for(node.value) for node in questions.body] == ["seen", "seen", None, None]
