"""Recipes with models that they have no numbers for: what a user must type to have them."""

import re

from longctx import cli
from longctx.config import RunConfig
from longctx.errors import UserError

REFUSED = re.compile(r"has numbers for \w+, ([\d,]+) rows of ([\d,]+) tokens a step, and none for")


def given_sizes(line: str) -> list[str]:
    """The sizes that a refusal names, as they are typed."""
    told = REFUSED.search(line)
    assert told, line
    rows, tokens = (number.replace(",", "") for number in told.groups())
    return [f"train.batch_rows={rows}", f"data.seq_len={tokens}"]


def compose(arguments: list[str]) -> RunConfig:
    """The run, with the recipe's own sizes typed where they are not taken otherwise."""
    try:
        return cli.compose(arguments, RunConfig, "train", "run_schema")
    except UserError as error:
        sizes = given_sizes(str(error))
        return cli.compose([*arguments, *sizes], RunConfig, "train", "run_schema")
