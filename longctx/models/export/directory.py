"""Writes a model directory that transformers loads, with code where it has no such model.

The directory appears complete or not at all: it is written under another name and renamed. Costs
one copy of the weights on disk.
"""

import shutil
import tempfile
from pathlib import Path

from transformers import PreTrainedModel

from longctx.errors import UserError
from longctx.models.export.classes import save_own_code
from longctx.models.load import load_tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def export(model: PreTrainedModel, tokenizer_path: str | None, directory: str | Path) -> Path:
    """Saves configuration, safetensors weights and tokenizer.

    Args:
        model: a plain model; adapters are merged before.
        tokenizer_path: a directory (its files are copied), a `.gguf` file or a hub name. None: no
            tokenizer.
        directory: where; an earlier export there is replaced.

    Returns:
        The directory.

    Raises:
        UserError: if the directory holds something else, or cannot be written.
    """
    assert isinstance(model, PreTrainedModel), "merge adapters before the export"
    target = Path(directory)
    if target.exists() and not (target / "config.json").is_file() and any(target.iterdir()):
        raise UserError(f"{target} exists and is not a model directory; choose another one")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}") from error
    try:
        save_own_code(model, fresh)
        model.save_pretrained(fresh)
        if tokenizer_path is not None:
            _copy_tokenizer(tokenizer_path, fresh)
        fresh.chmod(0o755)
        if target.exists():
            old = fresh.with_name(fresh.name + ".old")
            target.rename(old)
            fresh.rename(target)
            shutil.rmtree(old)
        else:
            fresh.rename(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def _copy_tokenizer(tokenizer_path: str, directory: Path) -> None:
    """Byte for byte from a directory, since stores know a tokenizer by the hash of its files."""
    source = Path(tokenizer_path)
    if not source.is_dir():
        load_tokenizer(tokenizer_path).save_pretrained(directory)
        return
    present = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not present:
        raise UserError(f"{source} holds no tokenizer ({', '.join(TOKENIZER_FILES[:3])})")
    for file in present:
        shutil.copyfile(file, directory / file.name)
