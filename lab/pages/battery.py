"""A committed report, docs/reports/NAME, from what `bash lab/studies/battery.sh` measured.

    python lab/pages/battery.py NAME DIR [DIR ...]

The same `report.md` that `evaluate.py` writes, of several models side by side, with paths below the
repository's root; the page (`report.html`), prompts and answers stay where they were written.
"""

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from longctx.eval.report import write_report  # noqa: E402
from longctx.eval.results import read_results  # noqa: E402


def below_root(value: Any) -> Any:
    """The same with absolute paths made relative to the root, and `python` without its place."""
    if isinstance(value, dict):
        return {key: below_root(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [below_root(entry) for entry in value]
    return " ".join(map(_word, value.split(" "))) if isinstance(value, str) else value


def _word(word: str) -> str:
    before, found, rest = re.match(r"([^/]*)(/.*/(?=(?:outputs|assets|data)/))?(.*)", word).groups()  # type: ignore[union-attr]
    if found:
        return f"{before}{rest}"
    return "python" if re.fullmatch(r"/.*/python[\d.]*", word) else word


def main(name: str, *given: str) -> None:
    """Writes docs/reports/NAME."""
    out = ROOT / "docs" / "reports" / name
    out.mkdir(parents=True, exist_ok=True)
    models = [below_root(read_results(Path(directory))) for directory in given]
    write_report(models, out)
    for rest in (*out.glob("*.svg"), out / "report.html"):  # report.md shows the same, as PNG
        rest.unlink()
    print(f"wrote {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
