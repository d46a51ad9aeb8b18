"""nightly.toml: what happens every night, as one frozen `Nightly`. What is wrong in the file is said with its remedy.

Every table and key is below, with its default; docker/nightly.toml explains them. Nothing is looked up here: whether a
source or a model is there is asked when the night begins.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints
from urllib.parse import urlsplit

from engines.spec import Precision
from pipeline.batch import Reason
from pipeline.config import UsageError
from pipeline.duration import parse_duration
from pipeline.sources import SOURCES, SourceError
from pipeline.sources.places import canonical_root
from pipeline.store.publish import KEEP

T = TypeVar("T")
Level = Literal["off", "quick", "sample", "full"]


class Wrong(Exception):
    """A value that cannot be taken; the words say what was expected."""


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise Wrong('text in quotes, such as "cpu"')
    return value


def _root(value: Any) -> str:
    try:
        canonical_root(_text(value))
    except SourceError as error:
        raise Wrong(f"one without secrets: {error}") from None
    return _text(value)


def _path(value: Any) -> Path:
    return Path(_text(value)).expanduser()


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Wrong("true or false")
    return value


def _duration_s(value: Any) -> int:
    try:
        return parse_duration(_text(value))
    except (ValueError, Wrong):
        raise Wrong('a length of time in quotes, such as "90m", "6h" or "1h30m"') from None


def _percent(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise Wrong("a number from 0 to 100, in percent")
    return float(value)


def _count(least: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise Wrong(f"a whole number of at least {least}")
        return value

    return check


def _one_of(allowed: Iterable[str]) -> Callable[[Any], str]:
    words = sorted(allowed)

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in words:
            raise Wrong(f"one of {_quoted(words)}{_did_you_mean(value, words)}")
        return value

    return check


def _reasons(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise Wrong('a list such as ["truncated", "timeout"]')
    return tuple(_one_of(get_args(Reason))(word) for word in value)


def _url(value: Any) -> str:
    try:
        parts = urlsplit(_text(value))
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and value.isascii() and value.isprintable()
        _ = parts.port
    except ValueError:
        good = False
    if not good:
        raise Wrong('an address such as "https://hooks.example.org/night"')
    return _text(value)


def _header(value: Any) -> str:
    if not (_text(value).isascii() and all(char.isalnum() or char in "-_" for char in value)):
        raise Wrong('the name of an HTTP header, such as "Authorization"')
    return _text(value)


@dataclass(frozen=True, kw_only=True)
class SourceTable:
    """[[source]], once for each root; as --source, --root and --split of pipeline.index."""

    kind: Annotated[str, _one_of(SOURCES)]
    root: Annotated[str, _root] = field(repr=False)  # one that is refused may hold a password
    split: Annotated[str | None, _text] = None

    @property
    def place(self) -> str:
        """Where its files lie, however that is written."""
        return "/".join(filter(None, (canonical_root(self.root), self.split)))

    def holds(self, other: SourceTable) -> bool:
        """Whether it lists what the other one lists too: folder and inat2021 take the same files."""
        kinds = {self.kind, other.kind}
        return other.place.startswith(f"{self.place}/") and (len(kinds) == 1 or kinds == {"folder", "inat2021"})


@dataclass(frozen=True, kw_only=True)
class IndexTable:
    """[index]: what is made of them, as the options of pipeline.index that are called the same."""

    out: Annotated[Path, _path]
    model: Annotated[str | None, _text] = None  # NIGHTJAR_MODEL; only where named, it replaces another
    devices: Annotated[str, _text] = "auto"
    precision: Annotated[str, _one_of(["auto", *get_args(Precision)])] = "auto"
    budget_s: Annotated[int | None, _duration_s] = None
    max_deleted: Annotated[float, _percent] = 20.0
    max_quarantined: Annotated[int | None, _count(0)] = None
    retry: Annotated[tuple[str, ...], _reasons] = ()
    keep: Annotated[int, _count(1)] = KEEP


@dataclass(frozen=True, kw_only=True)
class VerifyTable:
    """[verify]: the look at the index before readers see tonight's."""

    level: Annotated[str, _one_of(get_args(Level))] = "sample"
    rows: Annotated[int, _count(1)] = 100


@dataclass(frozen=True, kw_only=True)
class ReportTable:
    """[report]: who is told what was done."""

    page: Annotated[bool, _flag] = True
    log: Annotated[Path | None, _path] = None
    metrics: Annotated[Path | None, _path] = None


@dataclass(frozen=True, kw_only=True)
class WebhookTable:
    """[webhook]: told when a night has failed. The address itself is often the secret, so it is never shown."""

    url: Annotated[str, _url] = field(repr=False)
    header: Annotated[str, _header] = "Authorization"
    header_env: Annotated[str | None, _text] = None  # environment variable with the header's value
    timeout_s: Annotated[int, _duration_s] = 10


@dataclass(frozen=True, kw_only=True)
class Nightly:
    sources: tuple[SourceTable, ...]
    index: IndexTable
    verify: VerifyTable = VerifyTable()
    report: ReportTable = ReportTable()
    webhook: WebhookTable | None = None


TABLES = {"index": IndexTable, "verify": VerifyTable, "report": ReportTable, "webhook": WebhookTable}


def load(path: Path) -> Nightly:
    """
    Raises:
        UsageError: one line: file, table, key, value, what was expected.
    """
    try:
        content = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; docker/nightly.toml is an example to start from") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is no TOML: {error}") from None
    _refuse_unknown(str(path), content, ["source", *TABLES], "table")
    sources = content.get("source", [])
    if isinstance(sources, dict):
        raise UsageError(f"{path}: [source] is one table; write [[source]], in double brackets, once for each root")
    if not isinstance(sources, list) or not sources or not all(isinstance(source, dict) for source in sources):
        raise UsageError(f"{path}: at least one [[source]] is needed, in double brackets, with kind and root")
    found: dict[str, Any] = {}
    for name, table in TABLES.items():
        values = content.get(name, {} if name == "index" else None)
        if values is None:
            continue
        if not isinstance(values, dict):
            raise UsageError(f"{path}: {name} is {_shown(values)}; it is a table: write [{name}] on a line of its own")
        found[name] = _take(table, values, f"{path}: [{name}]")
    plan = Nightly(sources=tuple(_take(SourceTable, one, f"{path}: [[source]]") for one in sources), **found)
    _check_together(path, plan)
    return plan


def _take(table: type[T], values: Mapping[str, Any], where: str) -> T:
    keys = {_name(key): key for key in fields(table)}  # type: ignore[arg-type]
    checks = get_type_hints(table, include_extras=True)
    _refuse_unknown(where, values, keys, "key")
    taken = {}
    for name, key in keys.items():
        if name in values:
            try:
                taken[key.name] = checks[key.name].__metadata__[0](values[name])
            except Wrong as wrong:
                shown = "" if not key.repr else f" is {_shown(values[name])};"
                raise UsageError(f"{where} {name}{shown} expected {wrong}") from None
        elif key.default is MISSING and key.default_factory is MISSING:
            raise UsageError(f"{where} needs {name}")
    return table(**taken)


def _name(key: Any) -> str:
    """As it is written in the file: a duration says its unit itself there."""
    return str(key.name).removesuffix("_s")


def _refuse_unknown(where: str, values: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    names = list(known)
    if unknown := next((name for name in values if name not in names), None):
        hint = _did_you_mean(unknown, names) or f"; there are {', '.join(names)}"
        raise UsageError(f"{where} has an unknown {what} {_shown(unknown)}{hint}")
    if "" in values:
        raise UsageError(f"{where} has a {what} without a name")


def _check_together(path: Path, plan: Nightly) -> None:
    seen: set[tuple[str, str, str | None]] = set()
    for source in plan.sources:
        if source.split is not None and source.kind != "inat2021":
            raise UsageError(f"{path}: [[source]] split is for kind inat2021, not for {source.kind}; leave it out")
        if (entry := (source.kind, source.place, source.split)) in seen:
            raise UsageError(f"{path}: [[source]] {source.kind} {source.root} is there twice; leave one out")
        seen.add(entry)
    if plan.webhook and plan.webhook.header_env is not None and plan.webhook.header_env not in os.environ:
        raise UsageError(
            f"{path}: [webhook] header_env names {plan.webhook.header_env}, which is not in the environment; set it"
        )


def _did_you_mean(word: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1) if isinstance(word, str) else []
    return f"; did you mean {near[0]}?" if near else ""


def _quoted(words: Iterable[str]) -> str:
    return ", ".join(f'"{word}"' for word in words)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
