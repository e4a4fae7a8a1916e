"""The few forms of HTML that the report is made of. Every text is escaped here."""

from __future__ import annotations

import html
import time
from collections.abc import Iterable, Sequence

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #22292f; background: #f4f6f8;
  margin: 0; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 12px; }
h3 { font-size: 14px; margin: 14px 0 6px; overflow-wrap: anywhere; }
.made { color: #66727d; margin: 2px 0 20px; font-size: 13px; }
section { background: #fff; border: 1px solid #e1e6ea; border-radius: 8px; padding: 18px 20px; margin: 0 0 18px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid #edf0f2; vertical-align: top; }
th { color: #66727d; font-weight: 600; }
th, td:first-child { white-space: nowrap; }
td { overflow-wrap: break-word; max-width: 420px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 14px; }
.grid svg { width: 100%; height: auto; display: block; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 12px; font-size: 13px; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 6px; }
.state { border-radius: 10px; padding: 1px 9px; background: #e8ecef; white-space: nowrap; }
.good { background: #dff2e5; color: #1d6b3a; } .bad { background: #fbe1e4; color: #a3222f; }
.doubtful { background: #fcefd8; color: #8a5a0b; }
img { max-width: 100%; height: auto; display: block; }
details { margin: 12px 0 0; } summary { cursor: pointer; }
pre { background: #f6f8fa; border-radius: 6px; padding: 12px; overflow-x: auto; font-size: 12px; }
.note { color: #66727d; font-size: 13px; margin: 8px 0 0; }
"""

#: Elements that have no content, and no end.
_EMPTY = ("img", "br")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def escaped(value: object) -> str:
    """The value as HTML: escaped, unless it is :class:`Markup`."""
    return value if isinstance(value, Markup) else html.escape(str(value))


def element(name: str, *children: object, **attributes: str) -> Markup:
    """``<name attribute="…">children</name>``; an attribute ``class_`` is ``class``."""
    given = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    if name in _EMPTY:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{''.join(escaped(child) for child in children)}</{name}>")


def joined(parts: Iterable[object]) -> Markup:
    """The parts one after the other."""
    return Markup("".join(escaped(part) for part in parts))


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """A table that scrolls sideways where it is too wide."""
    head = element("tr", *(element("th", cell) for cell in header))
    body = [element("tr", *(element("td", cell) for cell in row)) for row in rows]
    return element("div", element("table", head, *body), class_="wide")


def dot(color: str) -> Markup:
    """A spot in the colour of a run."""
    return element("span", class_="dot", style=f"background:{color}")


def folded(title: object, text: str) -> Markup:
    """Text of several lines, shown on a click."""
    return element("details", element("summary", title), element("pre", text))


def note(text: object) -> Markup:
    """A remark below something."""
    return element("p", text, class_="note")


def page(title: str, sections: Iterable[tuple[str, Markup]]) -> str:
    """The whole file; a section without content is left out."""
    made = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    shown = [element("section", element("h2", name), body) for name, body in sections if body]
    main = element("main", element("h1", title), element("p", f"mmtrain report, {made}", class_="made"), *shown)
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        # should any text ever get through unescaped, it may neither run nor fetch
        '<meta http-equiv="Content-Security-Policy"'
        " content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{escaped(title)}</title><style>{_STYLE}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{main}</body></html>\n'
