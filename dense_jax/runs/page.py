"""Self-contained HTML pages: text, tables and pictures in one file that needs no network."""

import base64
import dataclasses
import html
import re
from collections.abc import Sequence

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem;
       color: #1f2328; background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums;
        display: block; overflow-x: auto }
th, td { padding: .25rem .4rem; border-bottom: 1px solid #e5e5e5; text-align: right;
         white-space: nowrap }
th { white-space: normal; vertical-align: bottom }
.words { text-align: left }
td.words:not(:first-child) { white-space: normal }
tbody tr:hover { background: #f6f8fa }
p, pre { overflow-wrap: anywhere }
pre { background: #f6f8fa; padding: .8rem; white-space: pre-wrap }
img { max-width: 100%; vertical-align: top } .more { color: #59636e }
nav { display: flex; flex-wrap: wrap; column-gap: 1rem }
"""

# A number, its standard error and its unit; a dash or nothing where there is none.
_NUMBER = re.compile(r"-?|[-+<]? ?\d[\d.,]*(e[-+]?\d+)?( ± [\d.]+)?( MiB|%)?")


@dataclasses.dataclass
class Page:
  """An HTML page that grows by sections.

  Attributes:
    title: its heading.
    summary: a sentence or two below it.
  """

  title: str
  summary: str = ""
  _sections: list[tuple[str, list[str]]] = dataclasses.field(default_factory=list)

  def section(self, title: str) -> None:
    """Begins a section, to which everything that follows belongs."""
    self._sections.append((title, []))

  def text(self, text: str) -> None:
    """Adds a paragraph."""
    self._add(f'<p class="more">{html.escape(text)}</p>')

  def preformatted(self, text: str, before: str = "") -> None:
    """Adds text whose lines and spaces stay as they are, after other text in gray."""
    gray = f'<span class="more">{html.escape(before)}</span>' if before else ""
    self._add(f"<pre>{gray}{html.escape(text)}</pre>")

  def table(self, rows: Sequence[Sequence[str]]) -> None:
    """Adds a table; its first row is the header. Columns of numbers are aligned to the right."""
    classes = [
        "" if number and all(map(_NUMBER.fullmatch, column)) else ' class="words"'
        for number, (_, *column) in enumerate(zip(*rows, strict=True))
    ]

    def line(kind: str, row: Sequence[str]) -> str:
      cells = (f"<{kind}{which}>{html.escape(cell)}</{kind}>"
               for cell, which in zip(row, classes, strict=True))
      return f"<tr>{''.join(cells)}</tr>"

    head, *body = rows
    lines = [f"<table><thead>{line('th', head)}</thead><tbody>", *(line("td", r) for r in body)]
    self._add("\n".join([*lines, "</tbody></table>"]))

  def picture(self, png: bytes, what: str) -> None:
    """Adds a picture, a PNG file's content; `what` describes it to who cannot see it."""
    content = base64.b64encode(png).decode()
    self._add(f'<img alt="{html.escape(what)}" src="data:image/png;base64,{content}">')

  def _add(self, part: str) -> None:
    self._sections[-1][1].append(part)

  def html(self) -> str:
    """Returns the whole page."""
    title = html.escape(self.title)
    links = "".join(f'<a href="#s{number}">{html.escape(name)}</a>'
                    for number, (name, _) in enumerate(self._sections))
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width">',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{title}</h1><p>{html.escape(self.summary)}</p><nav>{links}</nav>",
    ]
    for number, (name, content) in enumerate(self._sections):
      parts += [f'<h2 id="s{number}">{html.escape(name)}</h2>', *content]
    return "\n".join([*parts, "</body></html>\n"])
