"""The command line of `pipeline.verify`, as one frozen `VerifyConfig`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from engines import RUNTIMES
from engines.spec import Precision
from pipeline.config import UsageError, only_index_here

Level: TypeAlias = Literal["quick", "sample", "full"]
EXAMPLES = """examples:
  python -m pipeline.verify --out inat2021-index                      every file and row, no picture is read
  python -m pipeline.verify sample --rows 500 --out inat2021-index    and 500 pictures embedded again
  python -m pipeline.verify full --out inat2021-index --json
  python -m pipeline.verify --repair --out inat2021-index             embed what is broken again, and nothing else

exit codes: 0 nothing wrong (or all of it repaired), 1 failed, 2 usage, or fewer than half of the pictures could be
compared, 4 a run writes to the index, 7 damage found"""


@dataclass(frozen=True)
class VerifyConfig:
    """Everything one verification depends on."""

    out: Path
    level: Level = "quick"
    rows: int = 256  # of `sample`
    seed: int = 0
    model: str | None = None
    devices: str = "auto"
    runtime: str = "auto"
    precision: Precision | Literal["auto"] = "auto"
    repair: bool = False
    json: bool = False


def parse(argv: list[str] | None) -> VerifyConfig:
    about = "Check every file, row and link of an index; embed pictures again and compare; repair."
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.verify", description=about, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("level", nargs="?", default="quick", choices=get_args(Level), help="default: quick")
    parser.add_argument("--out", type=Path, help="the index (default: the only ./*-index here)")
    parser.add_argument("--rows", type=int, default=256, metavar="N", help="sample: how many (default: 256)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="sample: which (default: 0)")
    parser.add_argument("--repair", action="store_true", help="drop what is broken and embed it again")
    parser.add_argument("--model", help="hub id or directory (default: the model the index was made with)")
    parser.add_argument(
        "--devices", default="auto", help="sample, full: cpu, gpu:0, ... or auto (default), of several the first"
    )
    parser.add_argument("--runtime", default="auto", choices=["auto", *RUNTIMES], help="sample, full: engine runtime")
    parser.add_argument("--precision", default="auto", choices=["auto", *get_args(Precision)], help="and its precision")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args(argv)
    if args.rows < 1:
        raise UsageError(f"--rows is {args.rows}; it must be at least 1")
    return VerifyConfig(**{**vars(args), "out": args.out or only_index_here()})
