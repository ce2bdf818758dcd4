# SPDX-License-Identifier: LGPL-2.1-or-later
"""A picture of scaling: the processor time of a pair against objects and connections, as an SVG."""

from collections.abc import Sequence
from math import log10
from typing import NamedTuple

WIDTH, HEIGHT = 720, 300
LEFT, TOP, PANEL, TALL = 60, 50, 280, 190


STYLE = (
    "<style>text{font:12px sans-serif;fill:#333}.axis{stroke:#999;fill:none}"
    ".a{stroke:#1f6feb;fill:#1f6feb}.b{stroke:#c2410c;fill:#c2410c}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>"
)


class Line(NamedTuple):
    """A line of a panel: its title, and pairs of a number and µs."""

    title: str
    points: Sequence[tuple[int, float]]


def svg(panels: Sequence[tuple[str, Sequence[Line]]], about: str) -> str:
    """Return two panels side by side, with a logarithmic axis of numbers and a common one of µs."""
    top = max(value for _, lines in panels for line in lines for _, value in line.points) * 1.1
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{about}</title>",
        STYLE,
        f'<text x="{LEFT - 40}" y="{TOP - 30}">µs of processor time of an add and a delete</text>',
    ]
    for index, (title, lines) in enumerate(panels):
        parts += panel(LEFT + index * (PANEL + 70), title, lines, top, labelled=index == 0)
    return "\n".join([*parts, "</svg>\n"])


def panel(left: int, title: str, lines: Sequence[Line], top: float, *, labelled: bool) -> list[str]:
    """Return the elements of one panel."""
    numbers = sorted({number for line in lines for number, _ in line.points})
    low, high = log10(numbers[0]), log10(numbers[-1])

    def place(number: int, value: float) -> tuple[float, float]:
        share = (log10(number) - low) / (high - low)
        return left + share * PANEL, TOP + TALL * (1 - value / top)

    bottom = TOP + TALL
    parts = [f'<path class="axis" d="M{left} {TOP}V{bottom}H{left + PANEL}"/>']
    parts.append(
        f'<text x="{left + PANEL / 2}" y="{bottom + 40}" text-anchor="middle">{title}</text>'
    )
    for number in numbers:
        x, _ = place(number, 0)
        parts.append(f'<text x="{x:.0f}" y="{bottom + 18}" text-anchor="middle">{number:,}</text>')
    if labelled:
        for share in (0, 0.5, 1):
            y = bottom - share * TALL
            text = (
                f'<text x="{left - 8}" y="{y + 4:.0f}" text-anchor="end">{share * top:.0f}</text>'
            )
            parts.append(text)
    for style, line in zip("ab", lines, strict=False):
        places = [place(*point) for point in line.points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="{style}" style="fill:none" stroke-width="2" d="M{path}"/>')
        parts += [f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
        x, y = places[-1]
        parts.append(f'<text x="{x - 4:.1f}" y="{y - 9:.1f}" text-anchor="end">{line.title}</text>')
    return parts
