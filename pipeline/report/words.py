"""What the page about a run says: its sentences, and the filters that make numbers and names readable.

Names are those of files, so anything can be in them: `shown` makes every character visible, the template escapes it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline import exits
from pipeline.report.thumbnails import Thumbnail

KEY_CHARS, WORDS_CHARS, ERROR_CHARS = 200, 240, 600
JOINER = "\u200d"  # holds emoji together; every other character that does not print is shown by its number

MEANING = {
    "empty": "The file has no bytes.",
    "truncated": "The end of the picture is missing, as after a copy that was cut off.",
    "corrupt": "It begins like a picture, but its data is broken.",
    "not_an_image": "It does not begin like any kind of picture.",
    "unsupported_format": "A valid picture of a kind that is not read here; convert it to JPEG, PNG or WebP.",
    "too_large": "More pixels than memory allows, in a format that cannot be decoded at reduced size.",
    "read_error": "The bytes could not be had. It is tried again in every run; its last vector stays meanwhile.",
    "decoder_crash": "It took its decoder down, twice, the second time alone.",
    "timeout": "Its decoder did not come back in time, twice, the second time alone.",
}
STATES = {
    exits.DONE: "done",
    exits.FAILED: "failed",
    exits.USAGE: "not started",
    exits.MANY_QUARANTINED: "done, look at the quarantine",
    exits.LOCKED: "locked",
    exits.BUDGET_SPENT: "budget spent",
    exits.MANY_DELETED: "stopped",
    exits.DAMAGED: "damage found",
    exits.INTERRUPTED: "interrupted",
}


def headline(run: Mapping[str, Any]) -> str:
    """What happened, in one sentence; of a run that failed, what failed."""
    if run.get("error"):
        return f"Failed: {shown(masked(run['error']), ERROR_CHARS)}"
    facts = [
        _count(run["embedded"], "new picture", "new pictures"),
        _count(run["copied"], "known one under another name", "known ones under other names"),
        _count(run["deleted"], "gone", "gone"),
    ]
    done = ", ".join(fact for fact in facts if fact)
    unlisted = run.get("unlisted", {}).get("count", 0)
    bads = [
        _count(run["quarantined_new"], "could not be read", "could not be read"),
        _count(unlisted, "part of the source could not be listed", "parts of the source could not be listed"),
    ]
    bad = ", ".join(fact for fact in bads if fact)
    if run["pending"]:
        left = _count(run["pending"], "is", "are")
        return f"Stopped early: {done or 'nothing new'}; {left} still to do, and nothing is lost."
    everything = f"all {run['inputs']:,} {'others ' if unlisted else ''}are accounted for."
    if not done and not bad:
        return f"Nothing new: {everything}"
    return f"{done or 'Nothing new'}; {f'{bad}; ' if bad else ''}{everything}"


def _count(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}" if count else ""


def again(run: Mapping[str, Any], index: Path) -> str:
    """The command of this run."""
    return masked(run.get("command", f"python -m pipeline.index --out {index}"))


def advice(run: Mapping[str, Any], index: Path) -> tuple[str, str] | None:
    """Why the run did not end with 0, and the command that helps."""
    command = again(run, index)
    told = {
        exits.MANY_QUARANTINED: (
            "More than --max-quarantined allows is newly bad, or could not be listed: look at it below. Everything "
            "else is published, and files that are repaired or replaced are taken up by the next run.", command,
        ),
        exits.BUDGET_SPENT: ("The time budget was spent. What is done is kept; the same command goes on.", command),
        exits.MANY_DELETED: (
            "The source lost more pictures than --max-deleted allows, so nothing of it was deleted or embedded. Is it "
            "mounted? If this is right:", f"{command} --max-deleted 100",
        ),
        exits.DAMAGED: (
            "Files of the index are damaged. This finds them and makes them anew.",
            f"python -m pipeline.verify --out {index} --repair",
        ),
        exits.INTERRUPTED: ("The run was interrupted. What is done is kept; the same command goes on.", command),
    }  # fmt: skip
    if run["exit"] == exits.DONE:
        return None
    return told.get(run["exit"], ("What was done before it failed is kept; the same command goes on there.", command))


def shown(text: object, limit: int = KEY_CHARS) -> str:
    """Any text, so that a person sees what is there: what does not print by its number, the middle of long ones cut."""
    told = "".join(ch if ch.isprintable() or ch == JOINER else ch.encode("unicode_escape").decode() for ch in str(text))
    return told if len(told) <= limit else f"{told[: limit // 2]} … {told[-(limit // 2) :]}"


def masked(text: str) -> str:
    """User and password of URLs do not belong on a page."""
    return re.sub(r"(\w+://)[^/@\s]+@", r"\1***@", text)


def humane_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f}\u00a0B" if unit == "B" else f"{count:,.1f}\u00a0{unit}"
        count /= 1000
    return f"{count:,.1f}\u00a0TB"


def humane_seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}\u00a0s" if seconds < 10 else f"{seconds:.0f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def rate(images_per_s: float) -> str:
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.1f}"


def data_uri(thumbnail: Thumbnail) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(thumbnail.jpeg).decode()}"


def page_template() -> Environment:
    """With autoescape on, and nothing undefined."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        shown=shown, words=lambda text: shown(text, WORDS_CHARS), bytes=humane_bytes, seconds=humane_seconds, rate=rate,
        uri=data_uri, masked=masked, number=lambda value: f"{value:,}", percent=lambda part: f"{100 * part:.0f}\u00a0%",
        day=lambda moment: f"{moment:%A} {moment.day} {moment:%B %Y}", clock=lambda moment: f"{moment:%H:%M} UTC",
        css=lambda name: name.replace(" ", "-"),
    )  # fmt: skip
    return environment
