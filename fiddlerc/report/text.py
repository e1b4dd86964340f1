"""Numbers as the page shows them."""

from __future__ import annotations


def format_rate(value: float) -> str:
    """Three digits: 5662.1 -> '5660', 0.27104 -> '0.271'."""
    return f"{float(f'{value:.3g}'):.12g}"


def format_us(microseconds: float) -> str:
    """1234.5 -> '1.23 ms'."""
    if microseconds < 1000:
        return f"{microseconds:.0f} µs" if microseconds >= 10 or microseconds == 0 else f"{microseconds:.1f} µs"
    return f"{microseconds / 1e3:.3g} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.3g} s"
