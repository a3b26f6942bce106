"""Plans a run: the memory and time it takes on a machine, and whether it fits."""

from longctx.plan.__main__ import main

__all__ = ["main"]
