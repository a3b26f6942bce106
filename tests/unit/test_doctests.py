"""The examples in docstrings."""

import doctest
import importlib

import pytest

from tests.helpers.process import ROOT

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("longctx", "recipes", "data_prep", "hydra_plugins")
    for path in (ROOT / folder).rglob("*.py")
    if ">>> " in path.read_text()
)


def test_there_are_some():
    assert "longctx.train.optim" in MODULES


@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0 and result.failed == 0
