"""Draws docs/idea.svg: a base of eight responses, and three targets of it.

    python docs/idea.py

The bars are computed. Grey, blue and orange can be read on white and on black.
"""

import pathlib

import numpy as np

from pfjax.targets import Target

SHORT, LONG = 4, 12
LENGTH = np.array([SHORT] * 3 + [LONG] * 5)
BASE = np.array([0.30, 0.08, 0.04, 0.18, 0.14, 0.12, 0.08, 0.06])
COLOURS = {SHORT: "#d9730d", LONG: "#2f81f7"}
GREY = "#768390"
WIDTH, HEIGHT, BAR, TALLEST = 205, 190, 17, 105


def density(alpha: float, is_length_aware: bool) -> np.ndarray:
    """The target at the one log Z' where it sums to 1, found by bisection."""
    target = Target(alpha, is_length_aware=is_length_aware)
    low, high = -9.0, 9.0
    for _ in range(60):
        log_z = (low + high) / 2
        p = np.exp(target.log_density(np.log(BASE), LENGTH, log_z))
        low, high = (log_z, high) if p.sum() > 1 else (low, log_z)
    return p


def panel(left: int, title: str, formula: str, p: np.ndarray) -> str:
    text = f'<text x="{left + WIDTH / 2}" text-anchor="middle" fill="{GREY}"'
    floor = 58 + TALLEST
    out = [f'{text} y="18" font-size="15" font-weight="600">{title}</text>']
    out += [f'{text} y="38" font-size="14" font-style="italic">{formula}</text>']
    start = left + (WIDTH - len(p) * (BAR + 3)) / 2
    for i, (height, length) in enumerate(zip(p * TALLEST / 0.83, LENGTH, strict=True)):
        out.append(
            f'<rect x="{start + i * (BAR + 3):.1f}" y="{floor - height:.1f}" '
            f'width="{BAR}" height="{height:.1f}" rx="1.5" fill="{COLOURS[int(length)]}"/>'
        )
    out.append(
        f'<path d="M{start - 4:.1f} {floor + 0.5} h{len(p) * (BAR + 3) + 5}" '
        f'stroke="{GREY}"/>'
    )
    mean = f"mean length {p @ LENGTH:.1f}"
    out.append(f'{text} y="{floor + 20}" font-size="13">{mean}</text>')
    return "\n".join(out)


POWER = 'p₀<tspan dy="-5" font-size="10">{}</tspan><tspan dy="5"> </tspan>'
TILT = 'e<tspan dy="-5" font-size="10">−λ|y|</tspan>'
PANELS = [
    ("the base model", "p₀", BASE),
    ("α = 4, whole sequences", POWER.format("4") + "/ Z", density(4, False)),
    ("α = 4, length-aware", POWER.format("4") + TILT, density(4, True)),
    ("α = ½, length-aware", POWER.format("½") + TILT, density(0.5, True)),
]


def main() -> None:
    width = WIDTH * len(PANELS)
    body = "\n".join(panel(i * WIDTH, *x) for i, x in enumerate(PANELS))
    legend = "".join(
        f'<rect x="{x}" y="{HEIGHT + 8}" width="11" height="11" rx="1.5" fill="{c}"/>'
        f'<text x="{x + 17}" y="{HEIGHT + 18}" font-size="13" fill="{GREY}">'
        f"a response of {n} tokens</text>"
        for x, (n, c) in zip((230, 430), COLOURS.items(), strict=True)
    )
    pathlib.Path(__file__).with_suffix(".svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + 28}" '
        f'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
        "\n<title>A base model and three targets</title>\n"
        f"{body}\n{legend}\n</svg>\n"
    )


if __name__ == "__main__":
    main()
