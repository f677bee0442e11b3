"""The page of a report: HTML that needs no network (style, script and plotly inside), light and dark, from a phone's
width up."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.files import atomic_write

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Cell:
    """A table cell: its text, and the value that its column is sorted by (None: by the text; NaN goes last)."""

    text: str
    order: float | None = None


def section(title: str, text: str, *content: str) -> str:
    """A section with a heading and a sentence that explains it; `content` is HTML, the others are plain text."""
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{''.join(content)}</section>"


def cards(items: Iterable[tuple[str, str, str]]) -> str:
    """Figures at a glance: (title, value, explanation), plain text."""
    inner = "".join(
        f'<div class="card"><div class="what">{escape(title)}</div><div class="value">{escape(value)}</div><div '
        f'class="why">{escape(why)}</div></div>'
        for title, value, why in items
    )
    return f'<div class="cards">{inner}</div>'


def table(headers: Sequence[str], rows: Iterable[Sequence[Cell]], marked: Iterable[int] = ()) -> str:
    """A table whose columns sort at a click on their header; rows numbered in `marked` (from 0) are set off."""
    head = "".join(f'<th scope="col"><button type="button">{escape(h)}</button></th>' for h in headers)
    marked = set(marked)
    body = ""
    for i, row in enumerate(rows):
        cells = "".join(
            f"<td{'' if c.order is None else f' data-order={chr(34)}{c.order}{chr(34)}'}>{escape(c.text)}</td>"
            for c in row
        )
        body += f"<tr{' class=marked' if i in marked else ''}>{cells}</tr>"
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def pairs(items: Mapping[str, Any]) -> str:
    """Names and values as a two-column list."""
    inner = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in items.items())
    return f"<dl>{inner}</dl>"


def code(text: str) -> str:
    """Text as it is, in a box that scrolls."""
    return f'<pre class="scroll">{escape(text)}</pre>'


def figure(fig: go.Figure, name: str, description: str) -> str:
    """A plotly figure; `name` is unique on the page, `description` says in words what it shows."""
    import plotly.io

    config = {"displaylogo": False, "responsive": True, "modeBarButtons": [["zoom2d", "resetScale2d", "toImage"]]}
    inner = plotly.io.to_html(
        fig,
        config=config,
        include_plotlyjs=False,
        full_html=False,
        div_id=name,
        default_height=f"{fig.layout.height or 340}px",
    )
    return f'<figure class="plot" role="img" aria-label="{escape(description)}">{inner}<figcaption>{escape(description)}</figcaption></figure>'


def picture(png: bytes, description: str) -> str:
    """A picture inside the page; `description` says in words what it shows, to who cannot see it."""
    return f'<figure><img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{escape(description)}"></figure>'


def labelled_picture(png: bytes | None, lines: Sequence[str]) -> str:
    """A picture, or none, with lines under it."""
    text = ", ".join(lines)
    source = (
        ""
        if png is None
        else f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{escape(text)}">'
    )
    return f"<figure>{source}<figcaption>{'<br>'.join(map(escape, lines))}</figcaption></figure>"


def gallery(rows: Iterable[str]) -> str:
    """Rows of labelled pictures, as many to a row as there is room for."""
    return '<div class="gallery">' + "".join(f"<div>{row}</div>" for row in rows) + "</div>"


def legend(items: Iterable[tuple[str, str, str]]) -> str:
    """A legend for several figures: (mark, colour, name)."""
    inner = "".join(
        f'<li><span style="color:{escape(color)}">{escape(mark)}</span> {escape(name)}</li>'
        for mark, color, name in items
    )
    return f'<ul class="legend">{inner}</ul>'


def folded(title: str, *content: str) -> str:
    """HTML that opens at a click on its title."""
    return f"<details><summary>{escape(title)}</summary>{''.join(content)}</details>"


def grid(figures: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="grid">{"".join(figures)}</div>' if len(figures) > 1 else "".join(figures)


def page(title: str, subtitle: str, body: Sequence[str]) -> str:
    """The whole document; plotly's script is put in once, where there is a figure."""
    content = "".join(body)
    plotly_script = ""
    if 'class="plot"' in content:
        from plotly.offline import get_plotlyjs

        plotly_script = f"<script>{get_plotlyjs()}</script>"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light '
        f'dark"><title>{escape(title)}</title><style>{_STYLE}</style>{plotly_script}</head>'
        f'<body><main><header><h1>{escape(title)}</h1><p class="subtitle">{escape(subtitle)}</p></header>{content}'
        "<footer>Written by Stillhouse. This file is complete in "
        f"itself.</footer></main><script>{_SCRIPT}</script></body></html>\n"
    )


def write(path: Path, document: str) -> Path:
    """An atomic write, so that a reader never sees half a report."""
    path = Path(path)
    with atomic_write(path) as temporary:
        temporary.write_text(document, encoding="utf-8")
    return path


_STYLE = """
:root{--ink:#1c2127;--soft:#5b6570;--line:#dfe3e8;--panel:#fff;--ground:#f5f6f8;--mark:#eef3fb;--accent:#0060a8}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ed;--soft:#9ba6b2;--line:#353c45;--panel:#1d2228;--ground:#14181d;--mark:#25303d;--accent:#6cb8f0}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1200px;margin:0 auto;padding:32px 20px 48px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:0 0 2px}h3{font-size:1rem;margin:20px 0 4px}
.subtitle,section>p,figcaption,.why,footer{color:var(--soft)}
.subtitle{margin:0 0 24px;overflow-wrap:anywhere}
section{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:18px 20px;margin:0 0 18px}
section>p{margin:0 0 12px;max-width:75ch}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(200px,1fr));gap:12px}
.card{border:1px solid var(--line);border-radius:8px;padding:12px 14px}
.what{font-size:.85rem;font-weight:600;overflow-wrap:anywhere}.value{font-size:1.5rem;font-weight:650;font-variant-numeric:tabular-nums;line-height:1.3;overflow-wrap:anywhere}
.why{font-size:.8rem;line-height:1.4}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:7px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{vertical-align:bottom;white-space:normal;min-width:64px}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--panel);white-space:normal;min-width:150px}
td:first-child{font-weight:600;overflow-wrap:anywhere}
tr.marked td{background:var(--mark)}
th button{all:unset;cursor:pointer;font-weight:600;font-size:.82rem;line-height:1.3;color:var(--soft)}
th button:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
th[aria-sort] button{color:var(--ink)}
th[aria-sort=ascending] button:after{content:" \\25B2"}th[aria-sort=descending] button:after{content:" \\25BC"}
figure{margin:12px 0 0;min-width:0}figcaption{font-size:.85rem;max-width:75ch}
img{max-width:100%;border-radius:4px;display:block}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:8px 20px}
.plot text:not(.hoverlayer text){fill:var(--ink)!important}
.plot .gridlayer path,.plot .zerolinelayer path{stroke:var(--line)!important}
.plot .modebar-btn path{fill:var(--soft)!important}
pre{margin:8px 0 0;padding:12px 14px;background:var(--ground);border:1px solid var(--line);border-radius:8px;font:.82rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,220px),1fr));gap:14px 24px;margin-top:10px}
.gallery>div:has(figure+figure){grid-column:span 2}
.gallery>div{display:flex;gap:8px}.gallery figure{margin:0;flex:1 1 0;min-width:0}.gallery img{width:100%;image-rendering:pixelated;border-radius:4px}
.gallery figcaption{font-size:.8rem;color:var(--soft)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 18px;margin:0;padding:0;font-size:.9rem}
details{margin-top:12px;font-size:.9rem}summary{cursor:pointer;color:var(--soft)}
dl{display:grid;grid-template-columns:minmax(90px,max-content) 1fr;gap:4px 18px;margin:8px 0 0;font-size:.9rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
footer{font-size:.82rem;text-align:center;padding-top:8px}
@media(max-width:520px){main{padding:18px 10px 32px}section{padding:14px 12px}.cards{grid-template-columns:repeat(2,minmax(0,1fr));gap:8px}.card{padding:10px}.value{font-size:1.2rem}th:first-child,td:first-child{min-width:105px}h1{font-size:1.4rem}}
@media print{section{break-inside:avoid}}
"""

_SCRIPT = """
// A figure is drawn as soon as it is read, before its neighbours in the grid: fit it once the page is whole.
for (const plot of document.querySelectorAll(".js-plotly-plot")) Plotly.Plots.resize(plot);
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const key = (row, i) => { const c = row.cells[i]; return "order" in c.dataset ? Number(c.dataset.order) : c.textContent; };
  heads.forEach((head, i) => head.firstChild.addEventListener("click", () => {
    const rows = [...table.tBodies[0].rows], first = rows.length && typeof key(rows[0], i) === "number" ? "descending" : "ascending";
    const way = head.ariaSort ? (head.ariaSort === "ascending" ? "descending" : "ascending") : first;
    heads.forEach(h => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", way);
    const sign = way === "ascending" ? 1 : -1;
    rows.sort((p, q) => {
      const a = key(p, i), b = key(q, i);
      if (typeof a === "string") return sign * a.localeCompare(b);
      return Number.isNaN(a) ? 1 : Number.isNaN(b) ? -1 : sign * (a - b);
    });
    table.tBodies[0].append(...rows);
  }));
}
"""
