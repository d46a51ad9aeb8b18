"""One frozen `Config` per command, built once at the edge; the only place where command lines are read.

"auto" is resolved before construction: what a `Config` holds is what runs.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from engines import RUNTIMES
from engines.origin import current_artifact
from engines.spec import Artifact, Precision, default_model
from pipeline.batch import Reason
from pipeline.devices import Devices, EngineWish, resolve_devices
from pipeline.duration import parse_duration
from pipeline.shares import POLICIES
from pipeline.sources import SOURCES, Source, open_source
from pipeline.store.generation import content_of
from pipeline.store.publish import KEEP

INDEX_EXAMPLES = """examples:
  python -m pipeline.index --source inat2021 --root /data/inat2021
  python -m pipeline.index --source folder --root ~/Pictures --out pictures-index
  python -m pipeline.index --source tar --root 's3://bucket/shards' --model ./my-clip
  python -m pipeline.index --source inat2021 --split val --download
  python -m pipeline.index --source folder --root /data --devices gpu:0,gpu:1
  python -m pipeline.index --source folder --root /data --budget 6h --retry truncated,read_error

A second run over unchanged pictures does nothing and says so; a run that was stopped is resumed by the same command.
exit codes: 0 done, 1 failed, 2 usage, 3 done but more newly quarantined or not listed than --max-quarantined, 4
another run holds the lock, 5 budget spent (what was done is published; resumable), 6 too many deletions, 7
readers cannot open what is published, 130 interrupted (resumable)"""


class UsageError(Exception):
    """The user asked for something that cannot be had; exit 2 with this one line."""


@dataclass(frozen=True)
class Config:
    """Everything one run of `pipeline.index` depends on."""

    source: Source
    artifact: Artifact
    out: Path
    devices: Devices
    runtime: str
    precision: Precision | Literal["auto"]
    sharing: str  # key of pipeline.shares.POLICIES
    max_quarantined: int | None
    max_deleted_percent: float
    retry: tuple[Reason, ...]  # quarantined for these reasons: to be tried again
    budget_s: float  # infinite without a budget
    keep: int  # generations, the one that is shown included
    json_only: bool
    download: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """As any other usage error: one line, and the JSON that a program reads."""
        raise UsageError(f"{message}; see {self.prog} --help")


def index_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m pipeline.index",
        description="Embed every picture of a source and publish a searchable index.",
        epilog=INDEX_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--source", required=True, choices=sorted(SOURCES), help="how the pictures are laid out")
    parser.add_argument("--root", help="folder, file or URL (inat2021: $NIGHTJAR_DATA, else ./data/inat2021)")
    parser.add_argument("--split", help="inat2021: train, train_mini (default), val or public_test")
    parser.add_argument("--download", action="store_true", help="inat2021: fetch and check the official archives first")
    about_model = f"hub id or directory (default: {default_model()}); only where named, it replaces another"
    parser.add_argument("--model", help=about_model)
    parser.add_argument("--out", type=Path, help="the index (default: ./<source>-index)")
    parser.add_argument("--devices", default="auto", help="auto, or a list such as gpu:0,gpu:1,cpu; a lane each")
    parser.add_argument(
        "--sharing", default="dynamic", choices=sorted(POLICIES), help="of work between lanes (default: dynamic)"
    )
    parser.add_argument("--runtime", default="auto", choices=["auto", *RUNTIMES], help="engine runtime")
    parser.add_argument("--precision", default="auto", choices=["auto", *get_args(Precision)], help="engine precision")
    parser.add_argument(
        "--max-quarantined",
        type=int,
        metavar="N",
        help="exit 3 if more than N are newly quarantined, or parts of the source that could not be listed",
    )
    parser.add_argument(
        "--max-deleted",
        type=float,
        default=20.0,
        metavar="PERCENT",
        help="stop (exit 6) instead of deleting more than this share of what the source had (default: 20)",
    )
    parser.add_argument("--retry", metavar="REASON,...", help=f"try quarantined again: {', '.join(get_args(Reason))}")
    parser.add_argument("--budget", metavar="TIME", help="publish what is done after 90m, 6h, 1h30m, ... (exit 5)")
    parser.add_argument(
        "--keep", type=int, default=KEEP, metavar="N", help="generations to keep (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="no progress, only the final JSON line")
    return parser


def parse_index(argv: list[str] | None) -> Config:
    """The run's configuration; with --download the source need not be there yet.

    Raises:
        UsageError, SourceError, ArtifactMissing, DeviceUnavailable, EngineUnavailable: one line each, with the remedy.
    """
    args = index_parser().parse_args(argv)
    source = open_source(args.source, args.root, split=args.split, download=args.download)
    if not 0 <= args.max_deleted <= 100:
        raise UsageError(f"--max-deleted is {args.max_deleted}; it is a share in percent, 0 to 100")
    if args.keep < 1:
        raise UsageError(f"--keep is {args.keep}; the generation that readers see is one, so it is at least 1")
    if args.max_quarantined is not None and args.max_quarantined < 0:
        raise UsageError(f"--max-quarantined is {args.max_quarantined}; it is a number of pictures, at least 0")
    out = args.out or Path(f"{args.source}-index")
    _refuse_out(out, source.root)
    artifact = current_artifact(args.model or default_model())
    if args.model is None:
        _refuse_another_model(out, artifact)
    return Config(
        source=source,
        artifact=artifact,
        out=out,
        devices=resolve_devices(args.devices, EngineWish(artifact, args.runtime, args.precision)),
        runtime=args.runtime,
        precision=args.precision,
        sharing=args.sharing,
        max_quarantined=args.max_quarantined,
        max_deleted_percent=args.max_deleted,
        retry=parse_reasons(args.retry.split(",")) if args.retry else (),
        budget_s=_budget_s(args.budget),
        keep=args.keep,
        json_only=args.json,
        download=args.download,
    )


def _refuse_out(out: Path, root: str) -> None:
    """Before anything is made: a folder that was mistyped is not left behind."""
    if out.resolve() == Path(root).resolve():
        raise UsageError(f"--out {out} is the root itself; give the index its own folder, such as {out / 'index'}")
    whole = out.absolute()
    if (whole / "manifest.sqlite").is_file():  # an index whose disk became read-only failed; its name is right
        return
    there = next(path for path in (whole, *whole.parents) if os.path.lexists(path))
    if refused := refusal(there):
        raise UsageError(f"--out {out}: {refused}; give a folder that this user may write to")


def _refuse_another_model(out: Path, artifact: Artifact) -> None:
    """Than that of what is shown: a job that lost its NIGHTJAR_MODEL must not embed everything anew and show that."""
    shown = content_of(out / "current")
    try:
        space, model = shown["space"], shown["spec"]["model"]
    except (KeyError, TypeError):  # nothing is shown; or damaged, which the run will tell
        return
    if space != artifact.spec.space:
        ours = artifact.spec.model
        raise UsageError(
            f"{out} holds vectors of {model}, and the model is {ours} by default here; name one: --model {model} to go "
            f"on, --model {ours} to replace it"
        )


def refusal(folder: Path) -> str:
    """Why no file can be made in it; "" where one can. Leaves nothing there."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # no fault of the name: the run says what it could not write
            return ""
        return f"no file can be made in {folder}: {error.strerror}"


def index_words(kind: str, root: str, options: Mapping[str, Any]) -> list[str]:
    """The beginning of the command that indexes this source, as a person types it."""
    words = ["python", "-m", "pipeline.index", "--source", kind, "--root", root]
    return words + [word for name, value in options.items() for word in (f"--{name}", str(value))]


def parse_reasons(words: Sequence[str]) -> tuple[Reason, ...]:
    """
    Raises:
        UsageError: one of them is no reason why a picture is quarantined.
    """
    reasons = {reason: reason for reason in get_args(Reason)}
    if unknown := [word for word in words if word not in reasons]:
        raise UsageError(f"--retry {unknown[0]!r}: there is no such reason; there are {', '.join(reasons)}")
    return tuple(reasons[word] for word in words)


def _budget_s(text: str | None) -> float:
    try:
        return math.inf if text is None else parse_duration(text)
    except ValueError as error:
        raise UsageError(f"--budget {error}") from None


def only_index_here() -> Path:
    found = [path.parent for path in sorted(Path().glob("*-index/current"))]
    if len(found) != 1:
        names = ", ".join(map(str, found)) or "none"
        raise UsageError(f"--out is needed: the indexes in this folder are: {names}")
    return found[0]
