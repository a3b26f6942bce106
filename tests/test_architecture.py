"""The house rules that a linter cannot hold: sizes, names, one home for each library, typed YAML.

Everything is found by looking at the tree, so a new file is held to the rules without a change
here. `test_something_is_found` keeps the parametrised tests from passing on an empty list.
"""

import ast
import dataclasses
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from longctx import config

ROOT = Path(__file__).resolve().parent.parent
CODE = ("longctx", "recipes", "data_prep", "hydra_plugins")
ENTRY_POINTS = [p for p in ("train.py", "evaluate.py", "generate.py") if (ROOT / p).exists()]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def found(pattern: str) -> list[str]:
    """Paths below the repository that match `pattern`, as text so that test names are readable."""
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern) if p.is_file())


MODULES = [path for folder in CODE for path in found(f"{folder}/**/*.py")]
LIBRARY = found("longctx/**/*.py")
YAML = found("conf/**/*.yaml")
STEMLESS = {"__init__", "method"}  # the contract
CONF_METHODS = {Path(p).stem for p in found("conf/attention/*.yaml")}
CODE_METHODS = {Path(p).stem for p in found("longctx/attention/*.py")} - STEMLESS
RECIPES = {Path(p).stem for p in found("conf/recipe/*.yaml")}
WITHOUT_PAGE = {"full"}  # plain attention needs no explanation
FAMILIES = {"longgen"}  # methods `longgen_*` share one page


def tree(path: str) -> ast.Module:
    """The parsed source of `path`."""
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def lines(path: str) -> int:
    """How many lines `path` has."""
    return len((ROOT / path).read_text(encoding="utf-8").splitlines())


def functions(path: str) -> Iterator[Function]:
    """Every function of `path`, nested ones and methods too."""
    return (node for node in ast.walk(tree(path)) if isinstance(node, Function))


def imported(path: str) -> set[str]:
    """Dotted names that `path` imports, lazily or not; `from a import b` is `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def below(name: str, package: str) -> bool:
    """Whether the dotted `name` is `package` or inside it."""
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize(
    ("pattern", "least"),
    [
        ("train.py", 1),
        ("longctx/*.py", 5),
        ("longctx/attention/*.py", 3),
        ("longctx/train/*.py", 3),
        ("recipes/*.py", 1),
        ("conf/attention/*.yaml", 1),
        ("conf/recipe/*.yaml", 1),
        ("conf/model/*.yaml", 1),
    ],
)
def test_something_is_found(pattern: str, least: int) -> None:
    assert len(found(pattern)) >= least


@pytest.mark.parametrize("path", MODULES)
def test_files_are_short(path: str) -> None:
    assert lines(path) <= (120 if path.startswith("recipes/") else 450)


@pytest.mark.parametrize("path", YAML)
def test_yaml_files_are_short(path: str) -> None:
    assert lines(path) <= 40


@pytest.mark.parametrize("path", ENTRY_POINTS)
def test_entry_points_are_short(path: str) -> None:
    assert lines(path) <= 60


@pytest.mark.parametrize("path", MODULES + ENTRY_POINTS)
def test_functions_are_short(path: str) -> None:
    sizes = {f.name: (f.end_lineno or f.lineno) - f.lineno + 1 for f in functions(path)}
    assert {name: n for name, n in sizes.items() if n > 60} == {}


@pytest.mark.parametrize("path", LIBRARY)
def test_public_names_have_a_docstring(path: str) -> None:
    bare = []
    for node in tree(path).body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        inner = node.body if isinstance(node, ast.ClassDef) else []
        methods = [m for m in inner if isinstance(m, Function) and not m.name.startswith("_")]
        bare += [d.name for d in (node, *methods) if ast.get_docstring(d) is None]
    assert bare == []


@pytest.mark.parametrize("path", [p for p in MODULES if not p.endswith("__init__.py")])
def test_modules_say_what_they_are(path: str) -> None:
    assert ast.get_docstring(tree(path))


@pytest.mark.parametrize("path", [p for p in MODULES if p.endswith("__init__.py")])
def test_init_only_reexports(path: str) -> None:
    def allowed(node: ast.stmt) -> bool:
        if isinstance(node, ast.Assign):
            return [ast.unparse(target) for target in node.targets] == ["__all__"]
        if isinstance(node, ast.FunctionDef):  # a lazy re-export
            parts = (ast.Expr, ast.If, ast.ImportFrom, ast.Return, ast.Raise)
            inner = [n for n in ast.walk(node) if isinstance(n, ast.stmt) and n is not node]
            return node.name == "__getattr__" and all(isinstance(n, parts) for n in inner)
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        return docstring or isinstance(node, ast.Import | ast.ImportFrom)

    assert [ast.unparse(node) for node in tree(path).body if not allowed(node)] == []


def test_no_file_is_named_utils() -> None:
    assert [p for p in found("**/utils.py") if not p.startswith(".")] == []


# --- one name for a method ------------------------------------------------------------------------


@pytest.mark.parametrize("stem", sorted(CONF_METHODS | CODE_METHODS))
def test_a_method_has_its_yaml_and_its_file(stem: str) -> None:
    assert stem in CONF_METHODS, f"conf/attention/{stem}.yaml is missing"
    assert stem in CODE_METHODS, f"longctx/attention/{stem}.py is missing"


@pytest.mark.parametrize("stem", sorted((CODE_METHODS | {"pi"}) - WITHOUT_PAGE))
def test_a_method_has_its_page(stem: str) -> None:
    family = stem.split("_", maxsplit=1)[0]
    stem = family if family in FAMILIES else stem
    assert (ROOT / "docs" / "methods" / f"{stem}.md").is_file()


@pytest.mark.parametrize("path", found("longctx/train/*.py"))
def test_the_trainer_knows_no_method(path: str) -> None:
    methods = CODE_METHODS | RECIPES | {"pi", "ntk", "yarn", "dca", "longgen", "cepe"}
    methods -= WITHOUT_PAGE  # "full" is also a word: the whole vocabulary, for one
    compared = [
        inner.value
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Compare | ast.MatchValue)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Constant)
    ]
    assert methods.intersection(str(value) for value in compared) == set()


# --- one home for a library -----------------------------------------------------------------------

HOMES = {
    "hydra": ("train.py", "evaluate.py", "generate.py", "longctx/cli.py", "hydra_plugins/"),
    "omegaconf": ("train.py", "evaluate.py", "generate.py", "longctx/cli.py", "hydra_plugins/"),
    "deepspeed": ("longctx/parallel/",),
    "transformers": ("longctx/models/", "data_prep/"),
    "flash_attn": ("longctx/attention/ops/causal.py",),
}


@pytest.mark.parametrize("library", HOMES)
def test_a_library_has_one_home(library: str) -> None:
    strangers = [
        path
        for path in MODULES + ENTRY_POINTS
        if not path.startswith(HOMES[library])
        and any(below(name, library) for name in imported(path))
    ]
    assert strangers == []


def test_attention_and_data_know_no_ranks() -> None:
    assert [
        path
        for path in found("longctx/attention/*.py") + found("longctx/data/*.py")
        if any(below(name, "torch.distributed") for name in imported(path))
    ] == []


@pytest.mark.parametrize("path", found("data_prep/**/*.py"))
def test_data_prep_sees_little_of_longctx(path: str) -> None:
    allowed = [
        "longctx.data.store",
        "longctx.data.passkey_text",
        "longctx.data.instructions",
        "longctx.errors",
        "longctx.data_prep",
    ]
    allowed += ["longctx.cli"] if path.endswith("filter_redpajama.py") else []  # an entry point
    stems = {"longctx", "longctx.data"}  # `from longctx.data import store` names the packages too
    seen = {name for name in imported(path) if below(name, "longctx")} - stems
    assert [n for n in seen if not any(below(n, home) for home in allowed)] == []


def test_the_import_contracts_stand() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = {c["id"]: c for c in settings["tool"]["importlinter"]["contracts"]}
    assert {"one-way", "data-beside", "model-beside", "deepspeed"} <= contracts.keys()
    layers = " ".join(contracts["one-way"]["layers"])
    order = ["recipes", "train", "recipe ", "models", "attention", "rope", "config", "errors"]
    places = [layers.index(f"longctx.{name}" if name != "recipes" else name) for name in order]
    assert places == sorted(places)


# --- configuration --------------------------------------------------------------------------------

GROUPS = {
    "model": config.ModelConfig,
    "rope": config.RopeConfig,
    "encoder": config.EncoderConfig,
    "adapter": config.AdapterConfig,
    "data": config.DataConfig,
    "optim": config.OptimConfig,
    "parallel": config.ParallelConfig,
    "train": config.TrainConfig,
    "wandb": config.WandbConfig,
}
HYDRA_KEYS = {"defaults", "hydra"}


def strays(values: dict[str, Any], schema: type[Any], where: str = "") -> list[str]:
    """Dotted keys of `values` that are no field of the dataclass `schema`."""
    known = {field.name: field.type for field in dataclasses.fields(schema)}
    out = []
    for key, value in values.items():
        if key not in known:
            out.append(where + key)
        elif isinstance(known[key], type) and dataclasses.is_dataclass(known[key]):
            out += strays(value or {}, known[key], f"{where}{key}.")
    return out


def yaml_keys(path: str) -> dict[str, Any]:
    """The settings of a YAML file, without Hydra's own keys."""
    loaded = yaml.safe_load((ROOT / path).read_text(encoding="utf-8")) or {}
    return {key: value for key, value in loaded.items() if key not in HYDRA_KEYS}


@pytest.mark.parametrize("path", [p for p in YAML if Path(p).parent.name in GROUPS])
def test_every_key_of_a_group_is_a_field(path: str) -> None:
    assert strays(yaml_keys(path), GROUPS[Path(path).parent.name]) == []


@pytest.mark.parametrize("path", found("conf/train.yaml") + found("conf/recipe*/*.yaml"))
def test_every_key_of_a_run_is_a_field(path: str) -> None:
    assert strays(yaml_keys(path), config.RunConfig) == []


def test_a_stray_key_is_seen() -> None:
    values = {"seed": 1, "optim": {"lr": 1.0, "learning_rate": 1.0}, "sed": 1}
    assert strays(values, config.RunConfig) == ["optim.learning_rate", "sed"]


# --- nothing of the machine it was written on -----------------------------------------------------


def test_no_path_of_one_machine() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: cannot tell tracked files from others")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    files = [ROOT / name for name in listing.split("\0") if name]
    words = [b"/" + b"work/", b"/tmp" + b"/v", b"/opt" + b"/pypi"]
    guilty = [
        str(path.relative_to(ROOT))
        for path in files
        if path.is_file() and any(word in path.read_bytes() for word in words)
    ]
    assert files
    assert guilty == []
