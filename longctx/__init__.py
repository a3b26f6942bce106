"""longctx extends the context window of pretrained decoder-only language models."""

from typing import Any

import longctx.models.export.register  # noqa: F401 - transformers then knows longctx's checkpoints


def __getattr__(name: str) -> Any:
    """Loads `load_model` on first use: importing longctx must not import transformers."""
    if name == "load_model":
        from longctx.models.load import load_model

        return load_model
    raise AttributeError(f"module 'longctx' has no attribute {name!r}")
