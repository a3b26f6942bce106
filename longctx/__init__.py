"""longctx extends the context window of pretrained decoder-only language models.

    import longctx
    model = longctx.load_model("PATH", attention="dca")
    model = longctx.load_model("PATH", rope={"name": "yarn", "factor": 8})
    tokenizer = longctx.load_tokenizer("PATH")
    longctx.export(model, "PATH", "DIRECTORY")  # with the tokenizer of PATH

The command line is `longctx --help`. Importing longctx imports neither torch nor transformers:
each name is loaded when it is first used.
"""

from typing import TYPE_CHECKING, Any

import longctx.models.export.register  # noqa: F401 - transformers then knows longctx's checkpoints

if TYPE_CHECKING:
    from longctx.config.rope import RopeConfig
    from longctx.data.store import Store
    from longctx.errors import UserError
    from longctx.models.export.directory import export
    from longctx.models.load import load_model, load_tokenizer

__all__ = ["RopeConfig", "Store", "UserError", "export", "load_model", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    """Loads a public name on first use."""
    if name in ("load_model", "load_tokenizer"):
        from longctx.models import load

        return getattr(load, name)
    if name == "export":
        from longctx.models.export.directory import export

        return export
    if name == "RopeConfig":
        from longctx.config.rope import RopeConfig

        return RopeConfig
    if name == "Store":
        from longctx.data.store import Store

        return Store
    if name == "UserError":
        from longctx.errors import UserError

        return UserError
    raise AttributeError(f"module 'longctx' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
