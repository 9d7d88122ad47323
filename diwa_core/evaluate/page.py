"""Pieces of the HTML pages: the page itself, tables, rates with their intervals, bars. Cells are HTML already; text is not."""

from __future__ import annotations

from html import escape

from diwa_core.evaluate.report_style import STYLE
from diwa_core.evaluate.statistics import Estimate

BAR_WIDTH = 200  # in the units of the pictures; on the page the style sheet decides


def build_page(title: str, sections: list[str]) -> str:
    """One self-contained page: no scripts, no outside files."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(sections) + "\n</main></body></html>\n"
    )


def make_table(head: list[str], rows: list[list[str]], total: list[list[str]] | None = None) -> str:
    """`head` is text, cells are HTML already."""
    header = "".join(f"<th>{escape(cell)}</th>" for cell in head)

    def body(lines: list[list[str]]) -> str:
        return "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)

    foot = f"<tfoot>{body(total)}</tfoot>" if total else ""
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{body(rows)}</tbody>{foot}</table></div>'


def show_rate(rate: Estimate) -> str:
    """Per cent with the interval."""
    return f'{100 * rate.value:.0f} % <span class="quiet">{100 * rate.low:.0f}–{100 * rate.high:.0f}</span>'


def show_gain(gain: Estimate) -> str:
    """Signed points with the interval."""
    return f'{100 * gain.value:+.0f} <span class="quiet">{100 * gain.low:+.0f} to {100 * gain.high:+.0f}</span>'


def rate_bar(rate: Estimate, base: Estimate | None) -> str:
    """A bar with the interval as a band; the base policy, where there is one, as a thinner bar below."""
    bars = _interval_bar(rate, 3, 16, "rate") + ("" if base is None else _interval_bar(base, 21, 7, "base"))
    return f'<div class="cell">{make_bar(22 if base is None else 30, str(rate), bars)}<span>{show_rate(rate)}</span></div>'


def _interval_bar(rate: Estimate, top: int, height: int, style: str) -> str:
    low, high, middle = BAR_WIDTH * rate.low, BAR_WIDTH * rate.high, top + height / 2
    whisker = f"M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 3}v6M{high:.1f} {middle - 3}v6"
    return (
        draw_rectangle("track", top, height, BAR_WIDTH)
        + draw_rectangle(style, top, height, BAR_WIDTH * rate.value)
        + draw_line("whisker", whisker)
    )


def make_bar(height: int, title: str, shapes: str) -> str:
    """An inline picture as wide as the style sheet says: bars may be squeezed, line widths stay."""
    view = f'viewBox="0 0 {BAR_WIDTH} {height}" height="{height}" preserveAspectRatio="none"'
    return f'<svg class="bar" {view} role="img"><title>{escape(title)}</title>{shapes}</svg>'


def draw_rectangle(style: str, top: int, height: int, width: float) -> str:
    """`style`: a class of the style sheet."""
    return f'<rect class="{style}" x="0" y="{top}" width="{width:.1f}" height="{height}"/>'


def draw_line(style: str, path: str) -> str:
    """`path`: as in SVG; its width does not scale."""
    return f'<path class="{style}" d="{path}" vector-effect="non-scaling-stroke"/>'
