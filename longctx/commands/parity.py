"""Proves that a recipe trains alike however a step is spread over processes."""

from longctx.parity.__main__ import main

__all__ = ["main"]
