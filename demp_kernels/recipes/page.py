"""One HTML page that needs nothing but itself: a table, key figures, plots, links to the files beside it."""
from __future__ import annotations

import base64
import html
from pathlib import Path
from string import Template
from typing import Any

__all__ = ["page"]


def page(
    *, title: str, subtitle: str, notice: str, cards: list[tuple[str, str]], titles: list[str], rows: list[list[str]],
    emphasis: str, figures: list[tuple[str, str]], wide: list[tuple[str, str]], facts: dict[str, Any], files: list[str],
) -> str:
    """The page's text, from the template report.html.

    notice: shown above everything if not empty. cards: (number, what it is). titles, rows: of the table, a row begins
    with its name. emphasis: class of the table's section, "demp" or "comparison". figures: (title, SVG), two in a row; wide: one in a row. facts: name ->
    value; None is left out. files: names of files in the page's folder.
    """
    return Template((Path(__file__).parent / "report.html").read_text()).substitute(
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        notice=f'<p class="notice">{html.escape(notice)}</p>' if notice else "",
        cards="".join(_card(*card) for card in cards),
        emphasis=html.escape(emphasis),
        head="".join(f"<th>{html.escape(name)}</th>" for name in titles),
        body="".join(f"<tr>{_cells(row)}</tr>" for row in rows),
        figures="".join(_figure(*figure) for figure in figures),
        wide="".join(_figure(*figure) for figure in wide),
        settings=_pairs(facts),
        files="".join(f'<li><a href="{html.escape(name)}">{html.escape(name)}</a></li>' for name in files),
    )


def _card(number: str, text: str) -> str:
    return f'<div class="card"><b>{html.escape(number)}</b><span>{html.escape(text)}</span></div>'


def _cells(row: list[str]) -> str:
    first, *others = (html.escape(cell) for cell in row)
    return f"<th>{first}</th>" + "".join(f"<td>{cell}</td>" for cell in others)


def _figure(title: str, svg: str) -> str:
    # as an image: ids and styles of one figure cannot reach another
    source = base64.b64encode(svg.encode()).decode()
    return (
        f'<figure><figcaption>{html.escape(title)}</figcaption>'
        f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{source}"></figure>'
    )


def _pairs(values: dict[str, Any]) -> str:
    shown = {name: value for name, value in values.items() if value is not None}
    return "".join(
        f"<div><dt>{html.escape(name.replace('_', ' '))}</dt><dd>{html.escape(_plain(value))}</dd></div>"
        for name, value in shown.items()
    )


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
