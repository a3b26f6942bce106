"""Prepares training data: from raw text to token stores of long documents."""

from longctx import cli
from longctx.data_prep.filter_redpajama import main as prepare
from longctx.data_prep.settings import FilterConfig


def main() -> None:
    """The command line."""
    cli.run(prepare, FilterConfig, "filter_redpajama", "filter_schema", cli.CONF / "data_prep")
