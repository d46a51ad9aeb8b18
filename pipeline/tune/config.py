"""The command line of `python -m pipeline.tune`."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import get_args

from engines import RUNTIMES
from engines.origin import current_artifact
from engines.spec import Precision, default_model
from pipeline.config import UsageError
from pipeline.devices import EngineWish, resolve_devices
from pipeline.setting import memory_limit_bytes
from pipeline.sources import SOURCES, Source, open_source

EXAMPLES = """examples:
  python -m pipeline.tune --source inat2021 --root /data/inat2021
  python -m pipeline.tune --source folder --root ~/Pictures --precision int8 --max-memory 2G

It takes less than three minutes and should have the host for itself. `pipeline.index` then uses what was found, and
says so. exit codes: 0 done, 1 failed, 2 usage or configuration"""
MEMORY_SHARE = 0.8  # of the host's, where --max-memory says nothing
UNITS = {"": 1, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class TuneConfig:
    source: Source
    wish: EngineWish
    devices: tuple[str, ...]  # each once
    max_memory_bytes: int  # of all lanes together
    json_only: bool


def tune_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.tune", description="Find this host's fastest setting for a model, on your pictures.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--source", required=True, choices=sorted(SOURCES), help="how the pictures are laid out")
    parser.add_argument("--root", help="as for pipeline.index")
    parser.add_argument("--split", help="as for pipeline.index")
    parser.add_argument("--model", default=default_model(), help="hub id or directory (default: %(default)s)")
    parser.add_argument("--devices", default="auto", help="auto, cpu, or GPUs such as gpu:0,gpu:1; each once")
    parser.add_argument("--runtime", default="auto", choices=["auto", *RUNTIMES], help="engine runtime")
    parser.add_argument("--precision", default="auto", choices=["auto", *get_args(Precision)], help="engine precision")
    parser.add_argument("--max-memory", metavar="SIZE", help="of all lanes together, such as 4G (default: 80 %% of it)")
    parser.add_argument("--json", action="store_true", help="no progress, only the final JSON line")
    return parser


def parse_tune(argv: list[str] | None) -> TuneConfig:
    """
    Raises:
        UsageError, SourceError, ArtifactMissing, DeviceUnavailable, EngineUnavailable: one line each, with the remedy.
    """
    args = tune_parser().parse_args(argv)
    source = open_source(args.source, args.root, split=args.split)
    wish = EngineWish(current_artifact(args.model), args.runtime, args.precision)
    names = tuple(dict.fromkeys(resolve_devices(args.devices, wish).names))
    gpu_names = tuple(name for name in names if name != "cpu")
    if gpu_names and args.devices != "auto" and "cpu" in names:
        raise UsageError(f"--devices {args.devices}: give GPUs alone; a CPU lane beside them is tried by itself")
    return TuneConfig(source, wish, gpu_names or names, _max_memory(args.max_memory), args.json)


def _max_memory(text: str | None) -> int:
    here = memory_limit_bytes()
    if text is None:
        return int(MEMORY_SHARE * here)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([MGT]?)B?", text.strip().upper())
    if match is None or not 0 < (wanted := int(float(match[1]) * UNITS[match[2]])) <= here:
        raise UsageError(
            f"--max-memory {text}: a size such as 900M or 4G, at most the {here / 1e9:.1f} GB of this host"
        )
    return wanted
