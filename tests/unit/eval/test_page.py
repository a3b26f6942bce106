from longctx.eval.page import render

LINES = [
    "# Two <models>", "", "## Perplexity, `a_b`", "",
    "One `c*d*` and **bold & more**,", "next line.",
    "", "| model | 256 | note |", "| --- | --- | --- |", "| a\\|b | 1,234.5 ± 0.1 | `x<y` |",
    "| c | **7.0 [1.0, 9.0]** | 12 prompts |", "", "- first", "- second", "",
    "![A figure](drawn.png)", "", "![A picture](photo.png)", "",
]  # fmt: skip
SVG = (
    '<?xml version="1.0"?>\n<!DOCTYPE svg>\n<svg width="360pt" height="72pt" viewBox="0 0 360 72">'
    '<metadata>http://example.org</metadata><path id="m1" style="stroke: #000000"/>'
    '<use xlink:href="#m1"/><g clip-path="url(#m1)"/></svg>\n'
)


def page(tmp_path):
    (tmp_path / "drawn.svg").write_text(SVG)
    (tmp_path / "drawn.png").write_bytes(b"not used")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    return render(LINES, tmp_path)


def test_text(tmp_path):
    found = page(tmp_path)
    for part in (
        "<title>Two &lt;models&gt;</title>",
        '<h2 id="perplexity-a_b">Perplexity, <code>a_b</code></h2>',
        '<a href="#perplexity-a_b">',
        "<p>One <code>c*d*</code> and <strong>bold &amp; more</strong>, next line.</p>",
        "<li>first</li>\n<li>second</li>",
    ):
        assert part in found


def test_tables_scroll_in_their_box_and_numbers_stand_right(tmp_path):
    found = page(tmp_path)
    for part in (
        '<div class="scroll" tabindex="0"><table>',
        '<th scope="row"><div>a|b</div></th><td class="number">1,234.5 ± 0.1</td>'
        "<td><code>x&lt;y</code></td>",
        '<td class="number"><strong>7.0 [1.0, 9.0]</strong></td><td>12 prompts</td>',
        '<th scope="col">model</th><th scope="col" class="number">256</th>'
        '<th scope="col">note</th>',
    ):
        assert part in found


def test_what_is_wide_may_break(tmp_path):
    lines = ["| a | b |", "| --- | --- |", "| `/x/y_z` | 1.0 ± 0.1 (gain 0.2 ± 0.1), 1.4 mixed |"]
    long = "dca (chunk_len=192, local_window=64)"
    found = render([*lines, f"| c | {long} |", "", "`runs/a_b`"], tmp_path)
    assert "<code>/<wbr>x/<wbr>y_<wbr>z</code>" in found and "<code>runs/<wbr>a_b</code>" in found
    assert '<td class="number">1.0 ± 0.1<br>(gain 0.2 ± 0.1), 1.4 mixed</td>' in found
    assert f'<td class="long">{long}</td>' in found
    assert '<th scope="col">b</th>' in found  # not all of its column are numbers


def test_figures_are_inside_and_take_the_ink_of_the_page(tmp_path):
    found = page(tmp_path)
    assert '<path id="drawn-m1" style="stroke: currentColor"/>' in found
    assert '<use xlink:href="#drawn-m1"/><g clip-path="url(#drawn-m1)"/>' in found
    assert 'style="--own:360pt"' in found and 'width="360pt"' not in found
    assert '<img src="data:image/png;base64,iVBORw==" alt="A picture">' in found
    assert "example.org" not in found and "<!DOCTYPE svg>" not in found


def test_phone_dark_and_paper_are_thought_of(tmp_path):
    found = page(tmp_path)
    assert 'name="viewport" content="width=device-width' in found
    for part in ("prefers-color-scheme: dark", "@media print", "overflow-x: auto"):
        assert part in found
