"""Words: nothing of the machine a file was written on, no riddles, pages that name what exists."""

import re
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.tree import PRODUCT, ROOT, SCRIPTS, found, sources, text, tracked

needs_git = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="not a git checkout: tracked files are unknown"
)
PAGES = [*found("*.md"), *found("docs/**/*.md"), *found("assets/**/*.md")]
HISTORY = {"CHANGELOG.md"}  # names what there was
RIDDLES = (
    "manieth", "in vain", "whether it was", "where nobody looks", "which old chunk it is",
    "done beside the run",
)  # fmt: skip
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK_TITLE = re.compile(r'^```\w+ title="([^"]+)"', re.MULTILINE)
PLACEHOLDER = re.compile(r"[<>…{}$]|\.\.\.|[A-Z]{3,}")  # capital words: the reader's own
FOLDERS = tuple(
    f"{p.name}/" for p in ROOT.iterdir()
    if p.is_dir() and not p.name.startswith(".") and p.name not in {"data", "outputs", "wandb"}
)  # fmt: skip


@needs_git
def test_no_path_of_one_machine():
    words = [b"/" + b"work/", b"/tmp" + b"/v", b"/opt" + b"/pypi"]
    files = tracked()
    assert len(files) > 300
    guilty = [f for f in files if any(word in (ROOT / f).read_bytes() for word in words)]
    assert guilty == []


def test_no_riddles():
    files = PAGES + sources(*PRODUCT)
    files += [*found("conf/**/*.yaml"), *SCRIPTS]
    said = {f: [w for w in RIDDLES if w in " ".join(text(f).split())] for f in files}
    assert {f: words for f, words in said.items() if words} == {}


def missing_links(page: str) -> list[str]:
    """Relative links of a page to a file, or to a part of a page, that is not there."""
    missing = []
    for target in LINK.findall(without_code(text(page))):
        name, _, part = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        linked = (ROOT / page).parent / name if name else ROOT / page
        if not linked.exists() or (part and part not in anchors(linked)):
            missing.append(target)
    return missing


def without_code(page: str) -> str:
    """A page without its fenced blocks and its inline code."""
    return CODE.sub("", re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    """The parts of a page that a link can name."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_leads_somewhere():
    assert {page: bad for page in PAGES if (bad := missing_links(page))} == {}


def missing_paths(page: str) -> list[str]:
    """Files that a page names in backticks, does not write itself, and that are not there."""
    written = set(BLOCK_TITLE.findall(text(page)))
    named = [word for code in CODE.findall(text(page)) for word in code.split()]
    names = {word.rstrip(".,;") for word in named if not word.endswith(":")}  # not a subject
    missing = []
    for name in sorted(names - written):
        if PLACEHOLDER.search(name) or name.startswith("/") or "=" in name:
            continue
        if name.startswith(FOLDERS):
            there = found(name) or (ROOT / name).is_dir() or (ROOT / f"{name}.example").exists()
            missing += [] if there else [name]
        elif re.fullmatch(r"[\w/]+\.(py|sh)", name) and not known_name(name):
            missing.append(name)
    return missing


def known_name(name: str) -> bool:
    """Whether some file is called so, or the code writes one that is (`modeling_longctx.py`)."""
    if any(path.endswith(f"/{name}") or path == name for path in python_and_shell()):
        return True
    return any(f'"{name.removesuffix(".py")}"' in text(path) for path in sources("longctx"))


@cache
def python_and_shell() -> list[str]:
    """Every Python file and shell script, wherever it lies."""
    tops = sorted({folder.rstrip("/") for folder in FOLDERS})
    return [p for top in tops for p in found(f"{top}/**/*.py") + found(f"{top}/**/*.sh")] + [
        *found("*.py"),
        *found(".ci/*"),
    ]


def test_every_path_that_a_page_names_exists():
    pages = [page for page in PAGES if page not in HISTORY]
    assert {page: bad for page in pages if (bad := missing_paths(page))} == {}


def test_every_module_that_a_page_runs_exists():
    gone = {
        f"{page}: {module}"
        for page in PAGES
        if page not in HISTORY
        for module in re.findall(r"python -m ((?:longctx|lab|benchmarks)[\w.]*)", text(page))
        if not PLACEHOLDER.search(module)
        and not any((ROOT / f"{module.replace('.', '/')}{end}").exists() for end in ("", ".py"))
    }
    assert gone == set()


def test_the_index_names_every_page():
    """A page that docs/index.md does not name is not found; a method's is, by its file's name."""
    linked = set(LINK.findall(text("docs/index.md")))
    pages = {str(Path(p).relative_to("docs")) for p in found("docs/**/*.md")}
    missing = pages - linked - {"index.md"}
    assert {page for page in missing if not page.startswith("methods/")} == set()


def test_what_is_missing_is_seen(tmp_path, monkeypatch):
    page = "See [a](gone.md), [b](page.md#a-part), [c](page.md#b) `conf/gone.yaml` `conf/*.gone` "
    (tmp_path / "page.md").write_text(page + "`gone.py` `conf/<name>.yaml`\n\n## A part\n")
    monkeypatch.setattr("tests.helpers.tree.ROOT", tmp_path)
    monkeypatch.setattr("tests.house.test_words.ROOT", tmp_path)
    assert missing_links("page.md") == ["gone.md", "page.md#b"]
    assert missing_paths("page.md") == ["conf/*.gone", "conf/gone.yaml", "gone.py"]
