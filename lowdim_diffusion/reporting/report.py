"""A report as one HTML file that needs nothing else: no network, no scripts, no other files.

Pictures and figures are written into the page, the layout follows the width of the screen, and the
colours follow the reader's light or dark setting. All text is escaped.

Examples:
    >>> report = Report("Phase transition", "n = 48, 20 seeds")
    >>> _ = report.section("Setting").text("Recovery switches on at N = d.")
    >>> _ = report.table(["d", "N"], [[2, 2], [3, 3]], caption="Boundary")
    >>> report.html().startswith("<!doctype html>")
    True
"""

import base64
import contextlib
import html
import io
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lowdim_diffusion import __version__
from lowdim_diffusion._checks import fail
from lowdim_diffusion.reporting.figures import INK, LINE
from lowdim_diffusion.reporting.images import as_pictures, png

__all__ = ["Report"]

_CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d0d7de;
  --panel: #f6f8fa; --page: #ffffff; --accent: #2f7fc1; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d;
  --panel: #161b22; --page: #0d1117; --accent: #6cb0e8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2.5rem 1.25rem 3rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .35rem; font-weight: 650;
  overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0; font-weight: 650; }
p { margin: 0; max-width: 72ch; overflow-wrap: anywhere; }
.subtitle, .note, figcaption, caption, footer { color: var(--soft); }
nav { margin-top: 1rem; display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .9rem; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
section { margin-top: 2.25rem; padding-top: 1.5rem; border-top: 1px solid var(--line);
  display: grid; gap: 1.1rem 2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); }
section > * { grid-column: 1 / -1; min-width: 0; }
section > figure.plot { grid-column: auto; }
figure { margin: 0; }
figure.plot svg, figure.plot img { width: 100%; max-width: 600px; height: auto; display: block; }
section > figure.wide { grid-column: 1 / -1; overflow-x: auto; }
figure.wide svg { max-width: none; min-width: 640px; }
figcaption, caption { font-size: .875rem; line-height: 1.45; text-align: left; padding-top: .4rem; }
caption { caption-side: bottom; }
.picture { image-rendering: pixelated; max-width: 100%; height: auto; display: block; }
.cards { display: grid; gap: .75rem; margin: 0;
  grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
.cards > div { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: .7rem .85rem; }
.cards dt { font-size: .8rem; color: var(--soft); }
.cards dd { margin: 0; font-size: 1.2rem; font-weight: 600; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; line-height: 1.3; }
.cards .note { font-size: .8rem; font-weight: 400; display: block; }
.pairs { display: grid; gap: 1rem .9rem;
  grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); }
.pairs .two { display: grid; grid-template-columns: 1fr 1fr; gap: 3px; }
.pairs.stacked { grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.pairs.stacked .two { grid-template-columns: 1fr; }
.pairs img { width: 100%; }
.pairs figcaption { padding-top: .2rem; font-size: .8rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .925rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem 1.1rem .35rem 0; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; vertical-align: bottom; line-height: 1.3; }
.number { text-align: right; }
td.number { white-space: nowrap; }
pre { margin: 0; padding: .8rem 1rem; background: var(--panel); border: 1px solid var(--line);
  border-radius: 8px; overflow-x: auto; }
code { font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details summary { cursor: pointer; color: var(--accent); margin-bottom: .6rem; }
.commands { display: grid; gap: .9rem; grid-template-columns: minmax(0, 1fr); }
.commands p { margin-bottom: .3rem; }
.commands pre { white-space: pre-wrap; overflow-wrap: anywhere; }
footer { margin-top: 3rem; font-size: .85rem; }
@media (max-width: 560px) { main { padding: 1.5rem 1rem 2rem; } h1 { font-size: 1.45rem; }
  .cards { grid-template-columns: 1fr 1fr; } .cards dd { font-size: 1.05rem; }
  table { font-size: .85rem; } th, td { padding-right: .7rem; }
  .pairs { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); } }
@media print { nav { display: none; } section { break-inside: avoid; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
{subtitle}
{nav}
</header>
{sections}
<footer>{footer}</footer>
</main>
</body>
</html>
"""


def _text(value: Any) -> str:
    return html.escape(_format(value), quote=True)


def _format(value: Any) -> str:
    """Write numbers as a reader wants them, anything else as it is."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    if isinstance(value, float | np.floating):
        return f"{float(value):,.0f}" if 1e3 <= abs(value) < 1e9 else f"{float(value):.4g}"
    if getattr(value, "ndim", None) == 0:
        return _format(np.asarray(value)[()])
    return "–" if value is None else str(value)


def _is_number(value: Any) -> bool:
    scalar = getattr(value, "ndim", None) == 0  # numpy's and jax's numbers
    return scalar or (isinstance(value, int | float) and not isinstance(value, bool))


def _data_uri(picture: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode("ascii")


class Report:
    """Sections of text, numbers, figures, pictures and tables, written as one HTML file.

    The ``section`` method opens a section; everything added afterwards goes into it. Methods return
    the report, so calls can be chained. Numbers are formatted, and all text is escaped.

    Args:
        title: heading, and title of the browser's tab.
        subtitle: one line under it.
        footer: last line; names the package's version if empty.
    """

    def __init__(self, title: str, subtitle: str = "", *, footer: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self.footer = footer or f"Written by lowdim_diffusion {__version__}."
        self._sections: list[tuple[str, str, list[str]]] = []
        self._num_figures = 0

    def _add(self, content: str) -> "Report":
        if not self._sections:
            self._sections.append(("", "", []))
        self._sections[-1][2].append(content)
        return self

    def section(self, title: str, intro: str = "") -> "Report":
        """Open a section, with a sentence or two of introduction."""
        slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        taken = {anchor for _, anchor, _ in self._sections}
        anchor = next(a for a in (slug, *(f"{slug}-{i}" for i in range(2, 999))) if a not in taken)
        self._sections.append((title, anchor, []))
        return self.text(intro) if intro else self

    def text(self, text: str) -> "Report":
        """Add a paragraph; blank lines separate several."""
        paragraphs = [p.strip() for p in text.split("\n\n") if p.strip()]
        return self._add("".join(f"<p>{_text(p)}</p>" for p in paragraphs))

    def note(self, text: str) -> "Report":
        """Add a paragraph in the quieter colour."""
        return self._add(f'<p class="note">{_text(text)}</p>')

    def cards(self, values: Mapping[str, Any]) -> "Report":
        """Add key figures: label to value, or to ``(value, note)``."""
        parts = []
        for label, value in values.items():
            value, note = value if isinstance(value, tuple) else (value, "")
            below = f'<span class="note">{_text(note)}</span>' if note else ""
            parts.append(f"<div><dt>{_text(label)}</dt><dd>{_text(value)}{below}</dd></div>")
        return self._add(f'<dl class="cards">{"".join(parts)}</dl>')

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, caption: str = ""
    ) -> "Report":
        """Add a table; columns that hold only numbers are set flush right."""
        cells = [list(row) for row in rows]
        for row in cells:
            if len(row) != len(columns):
                raise fail("Report.table", "wrong length of a row", len(columns), len(row))
        numeric = [
            bool(cells) and all(_is_number(row[j]) for row in cells) for j in range(len(columns))
        ]
        kind = [' class="number"' if number else "" for number in numeric]
        head = "".join(
            f'<th scope="col"{k}>{_text(c)}</th>' for c, k in zip(columns, kind, strict=True)
        )
        body = "".join(
            "<tr>"
            + "".join(f"<td{k}>{_text(v)}</td>" for v, k in zip(row, kind, strict=True))
            + "</tr>"
            for row in cells
        )
        below = f"<caption>{_text(caption)}</caption>" if caption else ""
        return self._add(
            f'<div class="scroll"><table>{below}<thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def code(self, code: str, *, summary: str = "") -> "Report":
        """Add text to be read as it stands; with ``summary``, folded away under that line."""
        block = f"<pre><code>{html.escape(code.strip())}</code></pre>"
        if summary:
            block = f"<details><summary>{_text(summary)}</summary>{block}</details>"
        return self._add(block)

    def commands(self, commands: Iterable[tuple[str, str]]) -> "Report":
        """Add commands to try, each ``(what it does, command)``."""
        items = (
            f"<div><p>{_text(what)}</p><pre><code>{html.escape(command)}</code></pre></div>"
            for what, command in commands
        )
        return self._add(f'<div class="commands">{"".join(items)}</div>')

    def figure(
        self, figure: Any, caption: str = "", *, alt: str = "", wide: bool = False
    ) -> "Report":
        """Add a matplotlib figure as vector graphics; neighbouring figures share a row.

        Args:
            figure: a matplotlib ``Figure``.
            caption: what one sees.
            alt: for readers who do not see it; the caption if empty.
            wide: give it the whole width of the page; a narrow screen scrolls it.
        """
        self._num_figures += 1
        svg = _svg(figure, alt or caption or "figure", salt=f"f{self._num_figures}")
        below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
        return self._add(f'<figure class="plot{" wide" * wide}">{svg}{below}</figure>')

    def picture(
        self, picture: np.ndarray, caption: str = "", *, alt: str = "", width: int | None = None
    ) -> "Report":
        """Add one uint8 picture ``[h, w, 1 or 3]``, such as a grid, with sharp pixels.

        Args:
            picture: see :func:`lowdim_diffusion.reporting.images.image_grid`.
            caption: what one sees.
            alt: for readers who do not see it; the caption if empty.
            width: display width in pixels; at most the screen's.
        """
        height, own_width = picture.shape[:2]
        width = width or own_width
        size = f'width="{width}" height="{round(width * height / own_width)}"'
        below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
        return self._add(
            f'<figure><img class="picture" {size} alt="{_text(alt or caption)}" '
            f'src="{_data_uri(picture)}">{below}</figure>'
        )

    def pairs(
        self,
        left: Any,
        right: Any,
        captions: Sequence[str],
        *,
        left_name: str = "sample",
        right_name: str = "nearest training example",
    ) -> "Report":
        """Add pairs of pictures side by side with a caption each, in as many columns as fit.

        Args:
            left: ``[N, ...]`` as :func:`lowdim_diffusion.reporting.images.as_pictures` takes them;
                vectors are stacked instead.
            right: likewise.
            captions: N short texts.
            left_name: what the left pictures are, for readers who do not see them.
            right_name: what the right pictures are.
        """
        left, right = np.asarray(left), np.asarray(right)
        if left.ndim == right.ndim == 2 and left.shape == right.shape:  # vectors: one gray scale
            first, second = np.split(as_pictures(np.concatenate([left, right])), 2)
        else:
            first, second = as_pictures(left), as_pictures(right)
        if not len(first) == len(second) == len(captions):
            got = f"{len(first)}, {len(second)} and {len(captions)}"
            raise fail(
                "Report.pairs", "one partner and one caption per picture", "equal numbers", got
            )

        def image(picture: np.ndarray, name: str, i: int) -> str:
            if len(picture) == 1:
                picture = picture.repeat(max(1, picture.shape[1] // 8), axis=0)
            height, width = picture.shape[:2]
            return (
                f'<img class="picture" width="{width}" height="{height}" '
                f'alt="{_text(f"{name} {i + 1}")}" src="{_data_uri(picture)}">'
            )

        cells = (
            f'<figure><div class="two">{image(a, left_name, i)}{image(b, right_name, i)}</div>'
            f"<figcaption>{_text(text)}</figcaption></figure>"
            for i, (a, b, text) in enumerate(zip(first, second, captions, strict=True))
        )
        wide = " stacked" if first.shape[2] > 3 * first.shape[1] else ""
        return self._add(f'<div class="pairs{wide}">{"".join(cells)}</div>')

    def html(self) -> str:
        """Return the whole page."""
        named = [(title, anchor) for title, anchor, _ in self._sections if title]
        links = "".join(f'<a href="#{anchor}">{_text(title)}</a>' for title, anchor in named)
        sections = []
        for title, anchor, content in self._sections:
            heading = f"<h2>{_text(title)}</h2>\n" if title else ""
            identity = f' id="{anchor}"' if anchor else ""
            sections.append(f"<section{identity}>\n{heading}" + "\n".join(content) + "\n</section>")
        return _PAGE.format(
            title=_text(self.title),
            subtitle=f'<p class="subtitle">{_text(self.subtitle)}</p>' if self.subtitle else "",
            nav=f"<nav>{links}</nav>" if len(named) > 3 else "",
            sections="\n".join(sections),
            footer=_text(self.footer),
            css=_CSS,
        )

    def write(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Write the page to ``path``, whole or not at all, and return the path."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.html())
                file.flush()
                os.fsync(file.fileno())
            os.chmod(beside, 0o644)
            os.replace(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise
        return path


def _svg(figure: Any, alt: str, salt: str) -> str:
    """The figure as inline SVG whose ink follows the page's colours."""
    import matplotlib

    stream = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "path"}):
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = svg.replace(INK, "currentColor").replace(LINE, "var(--line)")
    # Glyphs and markers have plain names: make them this figure's own within the page.
    svg = re.sub(r'\bid="', f'id="{salt}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{salt}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{_text(alt)}" ', 1).strip()
