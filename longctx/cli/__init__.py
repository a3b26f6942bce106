"""From a command line to a typed configuration: what all commands share."""

from longctx.cli.arguments import prepare
from longctx.cli.mistakes import mistakes_in_one_line
from longctx.cli.places import CONF, ROOT
from longctx.cli.start import compose, help_text, run

__all__ = ["CONF", "ROOT", "compose", "help_text", "mistakes_in_one_line", "prepare", "run"]
