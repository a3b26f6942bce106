"""A committed report, docs/reports/NAME, from what `bash launch/battery.sh` measured.

    python benchmarks/battery_page.py NAME DIR [DIR ...]

The same page that `evaluate.py` writes, of several models side by side, with paths below the
repository's root; prompts and answers (`samples.jsonl`) stay where they were written.
"""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from longctx.eval.report import read_results, write_report  # noqa: E402


def below_root(value: Any) -> Any:
    """The same with paths below the current directory's `outputs` and `assets` made relative."""
    if isinstance(value, dict):
        return {key: below_root(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [below_root(entry) for entry in value]
    if isinstance(value, str):
        for folder in ("outputs", "assets", "data"):
            start = value.find(f"/{folder}/")
            if value.startswith("/") and start >= 0:
                return value[start + 1 :]
    return value


def main(name: str, *given: str) -> None:
    """Writes docs/reports/NAME."""
    out = ROOT / "docs" / "reports" / name
    out.mkdir(parents=True, exist_ok=True)
    models = [below_root(read_results(Path(directory))) for directory in given]
    write_report(models, out)
    for drawing in out.glob("*.svg"):  # inside report.html; report.md shows the PNG
        drawing.unlink()
    print(f"wrote {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
