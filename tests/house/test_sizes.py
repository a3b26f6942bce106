"""Sizes and shapes: how long files and functions are, and what each of them says about itself."""

import ast

import pytest

from tests.helpers.tree import (
    BESIDE,
    PRODUCT,
    SCRIPTS,
    Function,
    found,
    functions,
    length,
    lines,
    sources,
    tree,
)

FILE, RECIPE, SCRIPT, YAML, FUNCTION = 450, 120, 60, 40, 60  # lines
PRODUCT_FILES = sources(*PRODUCT)
OURS = PRODUCT_FILES + sources(*BESIDE) + list(SCRIPTS)


def limit(path: str) -> int:
    """Lines that a Python file may have."""
    if path in SCRIPTS:
        return SCRIPT
    return RECIPE if path.startswith("recipes/") else FILE


def test_something_is_found():
    places = (
        "train.py", "longctx/*.py", "longctx/attention/*.py", "longctx/train/*.py", "recipes/*.py",
        "data_prep/*.py", "hydra_plugins/**/*.py", "lab/**/*.py", "benchmarks/*.py",
        "tests/unit/**/*.py", "conf/attention/*.yaml", "conf/recipe/*.yaml", "conf/model/*.yaml",
    )  # fmt: skip
    assert [place for place in places if not found(place)] == []
    assert len(PRODUCT_FILES) > 150


def test_files_are_short():
    long = {p: lines(p) for p in OURS + sources("tests") if lines(p) > limit(p)}
    assert long == {}, f"at most {FILE} lines a file, {RECIPE} a recipe, {SCRIPT} a script"


def test_yaml_files_are_short():
    assert {p: lines(p) for p in found("conf/**/*.yaml") if lines(p) > YAML} == {}


def test_functions_are_short():
    long = {f"{p}: {f.name}": length(f) for p in OURS for f in functions(p) if length(f) > FUNCTION}
    assert long == {}, f"at most {FUNCTION} lines a function"


def test_modules_say_what_they_are():
    bare = [p for p in OURS if not p.endswith("__init__.py") and not ast.get_docstring(tree(p))]
    assert bare == [], "the first line of a module says what it is"


def test_public_names_have_a_docstring():
    bare = []
    for path in PRODUCT_FILES:
        for node in tree(path).body:
            if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
                continue
            inner = node.body if isinstance(node, ast.ClassDef) else []
            methods = [m for m in inner if isinstance(m, Function) and not m.name.startswith("_")]
            documented = (d for d in (node, *methods) if ast.get_docstring(d) is None)
            bare += [f"{path}: {d.name}" for d in documented]
    assert bare == []


def _reexports(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets] == ["__all__"]
    if isinstance(node, ast.FunctionDef):  # a lazy re-export
        parts = (ast.Expr, ast.If, ast.ImportFrom, ast.Return, ast.Raise)
        inner = [n for n in ast.walk(node) if isinstance(n, ast.stmt) and n is not node]
        return node.name in {"__getattr__", "__dir__"} and all(isinstance(n, parts) for n in inner)
    if isinstance(node, ast.If):  # for type checkers alone
        typing = ast.unparse(node.test) == "TYPE_CHECKING" and not node.orelse
        return typing and all(isinstance(n, ast.ImportFrom) for n in node.body)
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return docstring or isinstance(node, ast.Import | ast.ImportFrom)


def test_an_init_only_reexports():
    code = {
        path: ast.unparse(node)
        for path in PRODUCT_FILES
        if path.endswith("__init__.py")
        for node in tree(path).body
        if not _reexports(node)
    }
    assert code == {}


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("from longctx.rope import scale", True),
        ("__all__ = ['scale']", True),
        ("LIMIT = 3", False),
        ("def __getattr__(name):\n    from a import b\n    return b", True),
        ("def __getattr__(name):\n    for a in name:\n        return a", False),
        ("def helper():\n    return 1", False),
        ("if TYPE_CHECKING:\n    from a import b", True),
        ("if DEBUG:\n    from a import b", False),
    ],
)
def test_what_counts_as_a_reexport(source, allowed):
    assert _reexports(ast.parse(source).body[0]) is allowed
