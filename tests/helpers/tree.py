"""The repository's own sources as the house rules read them: files, syntax trees, imports."""

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PRODUCT = ("longctx", "recipes", "data_prep", "hydra_plugins")  # what an installation brings
BESIDE = ("lab", "benchmarks", "examples")
SCRIPTS = ("train.py", "evaluate.py", "generate.py")
LINKS = {"longctx.recipes": "recipes", "longctx.data_prep": "data_prep"}  # links to the top level

Function = ast.FunctionDef | ast.AsyncFunctionDef


def found(pattern: str) -> list[str]:
    """Files of the repository that match `pattern`, as text from the root; links are not followed.

    `longctx/recipes`, `longctx/data_prep` and `longctx/conf` are links to folders of the top level:
    the files are found there, once.
    """
    return sorted(
        str(path.relative_to(ROOT))
        for path in ROOT.glob(pattern)
        if path.is_file() and not _through_a_link(path)
    )


def _through_a_link(path: Path) -> bool:
    return any(parent.is_symlink() for parent in path.parents if parent.is_relative_to(ROOT))


def sources(*folders: str) -> list[str]:
    """Every Python file below these folders of the top level."""
    return [path for folder in folders for path in found(f"{folder}/**/*.py")]


@cache
def text(path: str) -> str:
    """What stands in a file."""
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def tree(path: str) -> ast.Module:
    """The parsed source of a Python file."""
    return ast.parse(text(path))


def lines(path: str) -> int:
    """How many lines a file has."""
    return len(text(path).splitlines())


def functions(path: str) -> Iterator[Function]:
    """Every function of a file, nested ones and methods too."""
    return (node for node in ast.walk(tree(path)) if isinstance(node, Function))


def length(node: Function) -> int:
    """Lines of a function."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def imported(path: str) -> set[str]:
    """Dotted names that a file imports, lazily or not; `from a import b` is `a` and `a.b`."""
    return _names(ast.walk(tree(path)))


def below(name: str, package: str) -> bool:
    """Whether the dotted `name` is `package` or inside it."""
    return name == package or name.startswith(package + ".")


def tracked() -> list[str]:
    """Files that git tracks, and new ones that it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


# --- which file imports which ---------------------------------------------------------------------


def modules(paths: list[str]) -> dict[str, str]:
    """Dotted name of each file -> the file; a package is its `__init__.py`."""
    return {_dotted(path): path for path in paths}


def _dotted(path: str) -> str:
    """`longctx.recipes.cepe` of `recipes/cepe.py`: linked folders are parts of the package."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for inside, top in LINKS.items():
        if below(name, top):
            return inside + name.removeprefix(top)
    return name


def imports(paths: list[str]) -> dict[str, set[str]]:
    """Which of these files imports which, whether at its top or inside a function.

    `from package import name` counts as an import of `package/name.py` where that file exists, and
    of `package/__init__.py` otherwise. What only a type checker reads does not count.
    """
    known = modules(paths)
    return {
        path: {
            known[name] for name in _needed(tree(path), known) if known[name] != path
        }
        for path in paths
    }  # fmt: skip


def _needed(module: ast.Module, known: dict[str, str]) -> set[str]:
    names: set[str] = set()
    for node in _running(module):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names.update(name if name in known else node.module for name in inner)
    return names & known.keys()


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """`ast.walk` without what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from (other, *_running(other))
        else:
            yield child
            yield from _running(child)


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Files that reach one another: the strongly connected components of more than one file."""
    reach = {path: _reachable(path, edges) for path in edges}
    groups = {
        tuple(sorted(other for other in reach[path] if path in reach[other]))
        for path in edges
        if path in reach[path]
    }
    return sorted(list(group) for group in groups)


def _reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    ahead = list(edges[start])
    while ahead:
        path = ahead.pop()
        if path not in seen:
            seen.add(path)
            ahead += edges[path]
    return seen


def _names(nodes: Iterator[ast.AST]) -> set[str]:
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names
