"""Code that travels with a checkpoint, so that transformers can run it where longctx is not.

The files are those of this package that a model needs, found by following their imports, and side
by side in one folder: `from longctx.a.b import c` becomes `from .longctx_a_b import c`. Only a file
that the importing one names in this way is copied by transformers. Costs reading some 15 files.
"""

import ast
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGE = __name__.partition(".")[0]
HEADER = "# {name} of {package}{version}, Apache-2.0; written with the checkpoint beside it.\n"


def flat(name: str) -> str:
    """The name of a module among the files of a checkpoint."""
    return name.replace(".", "_")


def closure(roots: Iterable[str]) -> dict[str, str]:
    """The modules of this package that `roots` need, and their sources with flat imports.

    Args:
        roots: dotted names of modules.
    """
    found: dict[str, str] = {}
    wanted = list(roots)
    while wanted:
        name = wanted.pop()
        if name not in found:
            found[name], needed = _flattened(name)
            wanted += needed
    return found


def write_code(directory: Path, roots: Iterable[str]) -> None:
    """Writes `roots` and all that they need into a folder.

    Args:
        directory: an existing one.
        roots: dotted names of modules.
    """
    for name, source in closure(roots).items():
        (directory / f"{flat(name)}.py").write_text(header(name) + source, encoding="utf-8")


def header(name: str) -> str:
    """The first line of a file that is written with a checkpoint."""
    try:
        number = " " + version(PACKAGE)
    except PackageNotFoundError:  # it runs from its repository
        number = ""
    return HEADER.format(name=name, package=PACKAGE, version=number)


def _flattened(name: str) -> tuple[str, list[str]]:
    """The source of a module with flat imports, and the modules of this package that it imports."""
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    lines, needed = source.splitlines(keepends=True), []
    nodes: list[Any] = [node for node in ast.walk(ast.parse(source)) if _ours(node)]
    for node in sorted(nodes, key=lambda node: node.lineno, reverse=True):
        assert isinstance(node, ast.ImportFrom), f"{name}:{node.lineno}: use `from ... import`"
        assert node.module is not None
        found = find_spec(node.module)
        assert found is not None, f"{name}:{node.lineno}"
        package = found.submodule_search_locations is not None
        if package:
            new, modules = [], [f"{node.module}.{alias.name}" for alias in node.names]
            for file, alias in zip(map(flat, modules), node.names, strict=True):
                new.append(f"from .{file} import __name__ as _  # transformers: copy this file")
                new.append(f"from . import {file} as {alias.asname or alias.name}")
        else:
            modules = [node.module]
            new = [f"from .{flat(node.module)} import {', '.join(map(ast.unparse, node.names))}"]
        needed += modules
        indent = " " * node.col_offset
        lines[node.lineno - 1 : node.end_lineno] = [f"{indent}{line}\n" for line in new]
    return "".join(lines), needed


def _ours(node: ast.AST) -> bool:
    """Whether it imports something of this package."""
    if isinstance(node, ast.ImportFrom):
        return node.level > 0 or (node.module or "").partition(".")[0] == PACKAGE
    if isinstance(node, ast.Import):
        return any(alias.name.partition(".")[0] == PACKAGE for alias in node.names)
    return False
