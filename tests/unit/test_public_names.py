"""`import longctx`: few public names, there without a heavy import, with their defaults."""

import inspect
import subprocess
import sys
import typing

import pytest

import longctx
from longctx.config import RopeConfig


def test_dir_shows_the_public_names_and_each_can_be_had():
    assert dir(longctx) == sorted(longctx.__all__)
    for name in longctx.__all__:
        assert getattr(longctx, name).__module__.startswith("longctx."), name
        assert inspect.getdoc(getattr(longctx, name)), name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = longctx.no_such_name


def test_importing_longctx_imports_neither_torch_nor_transformers():
    code = "import sys, longctx; print({'torch', 'transformers'} & set(sys.modules) or 'none')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "none"


def test_type_checkers_see_the_same_names(root):
    source = (root / "longctx" / "__init__.py").read_text()
    block = source.split("if TYPE_CHECKING:\n")[1].split("\n\n")[0]
    listed = {name for line in block.splitlines() for name in line.split(" import ")[1].split(", ")}
    assert listed == set(longctx.__all__)
    assert (root / "longctx" / "py.typed").is_file()
    assert typing.get_type_hints(longctx.load_model)["return"].__name__ == "PreTrainedModel"


def test_a_rope_of_two_numbers_has_the_other_defaults(lab_model):
    model = longctx.load_model(lab_model, rope={"name": "yarn", "factor": 8})
    found = model.config.rope_parameters
    assert found["beta_fast"] == RopeConfig.beta_fast and found["beta_slow"] == RopeConfig.beta_slow
    assert found["factor"] == 8 and model.config.max_position_embeddings == 8 * 256
