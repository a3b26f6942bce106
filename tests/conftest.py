"""What all tests share: one thread a process, no network, fixed hypothesis seeds, a few paths."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

for variable, value in {
    "OMP_NUM_THREADS": "1",  # before torch is imported: the tests run two processes on two cores
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "MPLBACKEND": "agg",
}.items():
    os.environ[variable] = value

settings.register_profile("longctx", derandomize=True, deadline=None)
settings.load_profile("longctx")

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite tests/golden/*.json (make golden)"
    )


@pytest.fixture(scope="session")
def update_golden(pytestconfig: pytest.Config) -> bool:
    """Whether golden files are to be rewritten instead of compared."""
    return bool(pytestconfig.getoption("--update-golden"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def lab_model() -> Path:
    """The lab model's directory (a small Llama with its tokenizer)."""
    return ROOT / "assets" / "lab-llama"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A place for one run; not made yet, as a user's would not be."""
    return tmp_path / "run"
