"""longctx extends the context window of pretrained decoder-only language models.

    longctx COMMAND KEY=VALUE ...
    longctx COMMAND --help          what it does, its settings and their choices

`python -m longctx` is the same command. On several GPUs the launcher starts it as a module:

    torchrun --nproc_per_node 8 -m longctx train recipe=pi model=PATH
    deepspeed --module longctx train recipe=pi model=PATH

`--config-dir DIR` adds recipes, models and other choices of your own: DIR/recipe/NAME.yaml is
recipe=NAME. Python modules beside DIR are found too (builder=NAME).
"""

import ast
import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

COMMANDS = Path(__file__).resolve().parent / "commands"


def commands() -> dict[str, str]:
    """What each file of `longctx/commands/` is called, and the first sentence of its docstring."""
    return {
        path.stem: (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n")[0]
        for path in sorted(COMMANDS.glob("[!_]*.py"))
    }


def help_text() -> str:
    """What `longctx --help` prints: one line a command."""
    found = commands()
    width = max(map(len, found))
    listed = "\n".join(f"  {name:<{width}}  {words}" for name, words in found.items())
    return f"{str(__doc__).strip()}\n\nCommands:\n{listed}"


def main() -> None:
    """Runs the command that the first argument names, with the arguments after it."""
    ranked = [a for a in sys.argv[1:2] if a.startswith("--local_rank")]  # DeepSpeed puts it first
    del sys.argv[1 : 1 + len(ranked)]
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        print(help_text())
    elif name == "--version":
        print(_version())
    elif name not in (found := commands()):
        sys.exit(_unknown(name, list(found)))
    else:
        sys.argv[:2] = [f"{sys.argv[0]} {name}"]
        importlib.import_module(f"longctx.commands.{name}").main()


def _version() -> str:
    try:
        return version("longctx")
    except PackageNotFoundError:
        return "longctx runs from a checkout that is not installed"


def _unknown(name: str, found: list[str]) -> int:
    print(f"error: longctx {name} is not a command: give one of {', '.join(found)}",
          file=sys.stderr)  # fmt: skip
    return 2


if __name__ == "__main__":
    main()
