"""Continues a long text: the answer to stdout, tokens/s and memory to stderr."""

import os
import re
import sys

from longctx import cli
from longctx.config.generate import GenerateConfig

TEXT = ("prompt", "prompt_file", "question")


def literal(argument: str) -> str:
    """The argument as Hydra wants it: free text is quoted, so that no character has a meaning."""
    key, mark, value = argument.partition("=")
    if key not in TEXT or not mark or value in ("", "null"):
        return argument
    if re.fullmatch(r"(['\"])(?:\\.|(?!\1)[^\\])*\1", value, re.DOTALL):  # as Hydra allows it
        return argument
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # no interpolation either
    value = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + "\\'" * bool(found[2]), value)
    return f"{key}='{value}'"


def generate(cfg: GenerateConfig) -> None:
    """Streams the text to stdout; what it took goes to stderr."""
    from longctx.generate import generate

    spent = generate(cfg, lambda text: print(text, end="", flush=True))
    print(flush=True)
    print(*spent.lines(), sep="\n", file=sys.stderr)


def main() -> None:
    """The command line."""
    # Transformers warns of windows that are extended on purpose.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.argv[1:] = [literal(argument) for argument in sys.argv[1:]]
    cli.run(generate, GenerateConfig, "generate", "generate_schema")
