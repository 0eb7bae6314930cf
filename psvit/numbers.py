"""Checks of the numbers that people pass."""

from __future__ import annotations


def check_number(name: str, value: object, least: int) -> None:
    """Raises ValueError unless it is a whole number, or a pair of them, from ``least`` up."""
    pair_of = isinstance(value, (tuple, list)) and len(value) == 2
    for number in value if pair_of else (value,):  # type: ignore[attr-defined]
        if not isinstance(number, int) or number < least:
            raise ValueError(f"{name}: got {value!r}, expected a whole number from {least} up")
