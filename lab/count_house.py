"""Counts the house: files, lines, circles of imports, lists kept by hand, files of one train step.

    python lab/count_house.py [ROOT]       default: this repository

To compare with an earlier commit: `git archive COMMIT | tar -x -C FOLDER`, and give that folder.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.helpers import tree  # noqa: E402


def listed_by_hand() -> list[str]:
    """Literals that name three or more methods, recipes or tasks, which are files in a folder."""
    tasks = {Path(p).stem for p in tree.found("longctx/eval/tasks/*.py")}
    kinds = {
        "methods": {Path(p).stem for p in tree.found("conf/attention/*.yaml")},
        "recipes": {Path(p).stem for p in tree.found("conf/recipe/*.yaml")},
        "tasks": tasks or {Path(p).stem for p in tree.found("longctx/eval/*.py")},
    }
    return [
        f"{path}:{node.lineno} lists {len(names)} {kind}"
        for path in tree.sources(*tree.PRODUCT, "tests")
        for node in ast.walk(tree.tree(path))
        if isinstance(node, ast.List | ast.Tuple | ast.Set | ast.Dict)
        for kind, known in kinds.items()
        if len(names := _strings(node) & known) > 3
    ]


def _strings(node: ast.AST) -> set[str]:
    parts = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
    return {str(p.value) for p in parts if isinstance(p, ast.Constant)}


def main() -> None:
    """Prints the table."""
    tree.ROOT = Path(sys.argv[1]).resolve() if sys.argv[1:] else ROOT
    product = tree.sources(*tree.PRODUCT)
    code = [line for path in product for line in tree.text(path).splitlines() if line.strip()]
    circles = tree.circles(tree.imports(product + tree.sources(*tree.BESIDE) + list(tree.SCRIPTS)))
    sizes = sorted(tree.lines(path) for path in product)
    evaluation = [path for path in product if path.startswith("longctx/eval/")]
    print(f"product files: {len(product)}, lines that are not blank: {len(code):,}")
    print(f"median file: {sizes[len(sizes) // 2]} lines, largest {sizes[-1]}")
    print(f"of longctx/eval: {len(evaluation)} files")
    print(f"lab and benchmarks: {len(tree.sources(*tree.BESIDE))} files")
    print(f"recipe x model settings: {len(tree.found('conf/recipe_model/**/*.yaml'))} YAML files")
    print(f"test functions: {sum(_tests(path) for path in tree.sources('tests'))}")
    print(f"circles of imports: {len(circles)}", *circles, sep="\n  ")
    hand = listed_by_hand()
    print(f"lists kept by hand: {len(hand)}", *hand, sep="\n  ")


def _tests(path: str) -> int:
    return sum(f.name.startswith("test") for f in tree.functions(path))


if __name__ == "__main__":
    main()
