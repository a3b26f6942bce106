"""Imports: one way, file by file; one home for each heavy library; no ranks in the mathematics."""

import tomllib

from tests.helpers.tree import (
    BESIDE,
    PRODUCT,
    SCRIPTS,
    below,
    circles,
    found,
    imported,
    imports,
    sources,
    text,
)

HOMES = {
    "hydra": ("longctx/cli/", "hydra_plugins/"),
    "omegaconf": ("longctx/cli/", "hydra_plugins/"),
    "deepspeed": ("longctx/parallel/",),
    "transformers": ("longctx/models/", "data_prep/"),
}
PREPARATION_SEES = ("longctx.data.store", "longctx.errors", "longctx.data_prep")


def test_no_circle_of_files():
    edges = imports(sources(*PRODUCT, *BESIDE) + list(SCRIPTS))
    assert sum(map(len, edges.values())) > 500, "imports are no longer understood"
    assert circles(edges) == [], "files that import one another, lazily or not"


def test_a_circle_is_seen():
    edges = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}
    assert circles(edges) == [["a", "b", "c"], ["d", "e"]]


def test_an_import_is_resolved_to_its_file(tmp_path, monkeypatch):
    written = {
        "a.py": "from p import b\nfrom p import NAME\nfrom p.c import d",
        "p/__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a",
        "p/b.py": "def f():\n    import p.c",
        "p/c.py": "import math",
    }
    for name, source in written.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.setattr("tests.helpers.tree.ROOT", tmp_path)
    assert imports(list(written)) == {
        "a.py": {"p/__init__.py", "p/b.py", "p/c.py"},
        "p/__init__.py": set(),
        "p/b.py": {"p/c.py"},
        "p/c.py": set(),
    }


def test_a_library_has_one_home():
    strangers = [
        f"{path} imports {library}"
        for path in sources(*PRODUCT) + list(SCRIPTS)
        for library, homes in HOMES.items()
        if not path.startswith(homes) and any(below(name, library) for name in imported(path))
    ]
    assert strangers == []


def test_a_home_is_lived_in():
    """A rule about a library that nobody imports is stale."""
    used = {name for path in sources(*PRODUCT) for name in imported(path)}
    assert [x for x in HOMES if not any(below(name, x) for name in used)] == []


def test_attention_and_data_know_no_ranks():
    strangers = [
        path
        for path in sources("longctx/attention", "longctx/data")
        if any(below(name, "torch.distributed") for name in imported(path))
    ]
    assert strangers == []


def test_the_product_sees_nothing_beside_it():
    beside = (*BESIDE, "tests")
    strangers = [
        f"{path} imports {name}"
        for path in sources(*PRODUCT) + list(SCRIPTS)
        for name in imported(path)
        if any(below(name, folder) for folder in beside)
    ]
    assert strangers == []


def test_data_prep_sees_little_of_longctx():
    strangers = []
    for path in found("data_prep/**/*.py"):
        allowed = [*PREPARATION_SEES]
        allowed += ["longctx.cli"] if path.endswith("filter_redpajama.py") else []  # a command
        packages = {"longctx", "longctx.data"}  # `from longctx.data import store` names them too
        seen = {name for name in imported(path) if below(name, "longctx")} - packages
        strangers += [
            f"{path} imports {n}" for n in seen if not any(below(n, home) for home in allowed)
        ]
    assert strangers == []


def test_the_import_contracts_stand():
    contracts = tomllib.loads(text("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    by_id = {contract["id"]: contract for contract in contracts}
    assert {"one-way", "data-beside", "model-beside", "deepspeed"} <= by_id.keys()
    layers = [
        [name.strip(" ()") for name in layer.split("|")] for layer in by_id["one-way"]["layers"]
    ]
    order = [
        "commands", "parity", "cli", "recipes", "train", "recipe", "models", "attention", "rope",
        "config", "errors",
    ]  # fmt: skip
    rows = [
        next(i for i, layer in enumerate(layers) if f"longctx.{name}" in layer) for name in order
    ]
    assert rows == sorted(rows)
    assert len(set(rows)) == len(order)


def test_ruff_opens_no_door_that_is_gone():
    """Every place with rules of its own in pyproject.toml exists; what may print does."""
    settings = tomllib.loads(text("pyproject.toml"))["tool"]["ruff"]["lint"]["per-file-ignores"]
    scripts = "{train,evaluate,generate}"
    places = {place.replace(scripts, "train"): rules for place, rules in settings.items()}
    files = {place: found(place.replace("/**", "/**/*.py")) for place in places}
    assert [place for place in places if not files[place]] == []
    printing = [place for place, rules in places.items() if "T20" in rules]
    assert [p for p in printing if not any("print(" in text(file) for file in files[p])] == []
