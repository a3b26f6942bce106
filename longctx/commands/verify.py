"""Verifies a token store: reads every document and compares it with its checksum."""

import sys

from longctx.data import store


def main() -> None:
    """The command line."""
    sys.exit(store.main(["verify", *sys.argv[1:]]))
