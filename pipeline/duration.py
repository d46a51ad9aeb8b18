"""Lengths of time as people write them: 90s, 15m, 6h, 1h30m, 2d."""

from __future__ import annotations

import re

_UNIT_S = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_WHOLE = re.compile(r"(?:(\d{1,8})d)?(?:(\d{1,8})h)?(?:(\d{1,8})m)?(?:(\d{1,8})s)?", re.ASCII)


def parse_duration(text: str) -> int:
    """Seconds, at least 1.

    Raises:
        ValueError: with what was given and what a duration looks like.
    """
    found = _WHOLE.fullmatch(text)
    seconds = sum(int(n) * s for n, s in zip(found.groups(default="0"), _UNIT_S.values(), strict=True)) if found else 0
    if not 0 < seconds <= 365 * 86_400:
        raise ValueError(f"{text!r} is no length of time; write 90m, 6h or 1h30m (d, h, m, s; at most a year)")
    return seconds


def words(seconds: float) -> str:
    """As people write it, to the second: 1h30m."""
    left, parts = max(1, round(seconds)), []
    for unit, size in _UNIT_S.items():
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)
