"""A report as one self-contained HTML file: no script, no font, no request.

Rendered from the lines of `report.md`, so there is no second text. Light and dark, narrow screens
(tables scroll inside their box) and paper are the style sheet's business. Figures are inlined as
SVG and take the colour of the text. Costs milliseconds, and the size of its figures.
"""

import re
from base64 import b64encode
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

CSS = Path(__file__).with_suffix(".css")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
IMAGE = re.compile(r"!\[(.*)\]\((.+)\)")
CELLS = re.compile(r"(?<!\\)\|")
NUMBER = re.compile(r"\W*[\d,.]+( ?%)?( ± [\d,.]+)?( \(.*\))?(, [\d.]+ mixed)?( ?\[.*\])?\W*")
ASIDE = re.compile(r" (\([^()]*\)(, [^()]*)?)$")  # behind a number; it goes on a second line
BELOW = r"<br>\1"
LONG, WORDY = ' class="long"', 24  # letters; it is not squeezed to a word a line
TABLE = "/,_"  # where code may break in a table
INK = re.compile(r"#000000|\bblack\b")


def render(lines: Sequence[str], folder: Path) -> str:
    """The page of a report.

    Args:
        lines: Markdown: headings, paragraphs, lists, tables, images, `code` and **bold**.
        folder: where the images are; of `x.png` the drawing `x.svg` is taken if it is there.

    Returns:
        A whole HTML document.
    """
    title = next((line[2:] for line in lines if line.startswith("# ")), "Evaluation")
    body = "\n".join(_blocks(lines, folder))
    style = CSS.read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _kind(line: str) -> str:
    for mark, kind in (("#", "heading"), ("|", "table"), ("- ", "list"), ("![", "image")):
        if line.startswith(mark):
            return kind
    return "text" if line else "gap"


def _blocks(lines: Sequence[str], folder: Path) -> Iterator[str]:
    text = "\n".join(lines).split("\n")  # a line of several lines is several
    for kind, group in groupby(text, _kind):
        block = list(group)
        if kind == "heading":
            for line in block:
                yield _heading(line)
                if line.startswith("# "):
                    yield _contents(text)
        elif kind == "table":
            yield _table(block)
        elif kind == "list":
            items = "\n".join(f"<li>{_inline(line[2:])}</li>" for line in block)
            yield f"<ul>\n{items}\n</ul>"
        elif kind == "image":
            yield from (_figure(line, folder) for line in block)
        elif kind == "text":
            yield f"<p>{_inline(' '.join(block))}</p>"


def _heading(line: str) -> str:
    marks, _, text = line.partition(" ")
    return f'<h{len(marks)} id="{_anchor(text)}">{_inline(text)}</h{len(marks)}>'


def _anchor(text: str) -> str:
    return "-".join(re.findall(r"\w+", text.lower()))


def _contents(lines: Sequence[str]) -> str:
    headings = [line[3:] for line in lines if line.startswith("## ")]
    links = "\n".join(f'<a href="#{_anchor(h)}">{_inline(h)}</a>' for h in headings)
    return f"<nav>\n{links}\n</nav>"


def _inline(text: str, breaks: str = "/,") -> str:
    """Text with its `code` and **bold**; code is left as it is.

    Code may end a line behind `breaks`: paths and lists are longer than a phone is wide.
    """
    parts = re.split(r"`([^`]*)`", text)
    for i, part in enumerate(parts):
        plain = escape(part, quote=False)
        bold = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", plain)
        code = re.sub(rf"(?<=[{breaks}])(?=\w)", "<wbr>", plain)
        parts[i] = f"<code>{code}</code>" if i % 2 else bold
    return "".join(parts)


def _table(lines: Sequence[str]) -> str:
    """A table in a box that scrolls; heads are aligned like their column's numbers."""
    rows = [[c.strip().replace("\\|", "|") for c in CELLS.split(x)[1:-1]] for x in lines]
    head, body = rows[0], rows[2:]
    columns = [[cell for cell in column if cell] for column in zip(*body, strict=True)]
    numeric = [bool(column) and all(map(NUMBER.fullmatch, column)) for column in columns]
    top = "".join(
        f'<th scope="col"{_aligned(right)}>{_inline(cell, TABLE)}</th>'
        for cell, right in zip(head, numeric or [False] * len(head), strict=True)
    )
    out = [f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>']
    for first, *others in body:
        name = f'<th scope="row"><div>{_inline(first, TABLE)}</div></th>'
        out.append(f"<tr>{name}{''.join(map(_cell, others))}</tr>")
    return "\n".join([*out, "</tbody></table></div>"])


def _cell(text: str) -> str:
    right = NUMBER.fullmatch(text) is not None
    inside = _inline(text, TABLE)
    if right:
        return f'<td class="number">{ASIDE.sub(BELOW, inside)}</td>'
    return f"<td{LONG if len(text) > WORDY else ''}>{inside}</td>"


def _aligned(right: bool) -> str:
    return ' class="number"' if right else ""


def _figure(line: str, folder: Path) -> str:
    match = IMAGE.fullmatch(line)
    assert match, line
    caption, name = match.groups()
    drawing = (folder / name).with_suffix(".svg")
    if drawing.exists():
        image = _svg(drawing.read_text(encoding="utf-8"), caption, drawing.stem)
    else:
        data = b64encode((folder / name).read_bytes()).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
    image = f'<div class="scroll" tabindex="0">{image}</div>'
    return f"<figure>\n{image}\n<figcaption>{_inline(caption)}</figcaption>\n</figure>"


def _svg(text: str, caption: str, stem: str) -> str:
    """A drawing as an element of the page: scaled to its width, in the colour of its text."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    opening, _, rest = text.partition(">")
    width = re.search(r'width="([\d.]+)pt"', opening)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    own = f' style="--own:{width[1]}pt"' if width else ""
    rest = INK.sub("currentColor", rest)
    # Names are of one drawing; on a page with several they must differ.
    rest = re.sub(r'\bid="', f'id="{stem}-', rest)
    rest = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{stem}-", rest)
    return f'{opening} role="img" aria-label="{escape(caption)}"{own}>{rest.strip()}'
