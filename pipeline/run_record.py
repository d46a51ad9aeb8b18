"""What runs/<n>.json says beyond the last line of a run: enough to look at it years later, whatever has gone since.

A few hundred kilobytes at most, however long the run was and however much it quarantined.
"""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import quote_from_bytes

import psutil

from engines.hardware import cpu_info, host_id, physical_cores
from engines.memory_gpu import gpus
from pipeline.config import Config, index_words
from pipeline.scheduler import Totals
from pipeline.store import Counts

WORDS_MAX = 500  # some decoders are talkative
PACKAGES = (
    "nightjar", "numpy", "h5py", "pillow", "simplejpeg", "pillow-heif", "onnxruntime", "onnxruntime-gpu", "tensorrt",
    "torch",
)  # fmt: skip


@dataclass
class Clock:
    """Start of the run, and the seconds of each of its phases."""

    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    phases_s: dict[str, float] = field(default_factory=dict)
    _inside_s: float = 0.0  # of phases that began and ended within the one that is going on

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts for `name`, and not for the phase it is a part of: the sum of all is the time that passed."""
        start_s, before_s, self._inside_s = monotonic(), self._inside_s, 0.0
        try:
            yield
        finally:
            took_s = monotonic() - start_s
            self.phases_s[name] = round(self.phases_s.get(name, 0.0) + took_s - self._inside_s, 3)
            self._inside_s = before_s + took_s


def run_record(cfg: Config, number: int, counts: Counts, totals: Totals, clock: Clock) -> dict[str, Any]:
    return {
        "run": number,
        "started": clock.started.isoformat(timespec="seconds"),
        "source": {"kind": cfg.source.kind, "root": cfg.source.root, "options": dict(cfg.source.options)},
        "command": _command(cfg),
        "phases_s": clock.phases_s,
        "commits": {"number": totals.commits, "seconds": round(totals.commit_s, 4)},
        "throughput": totals.throughput.as_json(),
        "sample_ids": totals.sample.ids,
        "quarantine": {
            reason: {
                "count": found.count,
                "examples": [
                    {**row._asdict(), "locator": quote_from_bytes(row.locator), "words": row.words[:WORDS_MAX]}
                    for row in found.examples
                ],
            }
            for reason, found in counts.reasons.items()
        },
        "engines": _engines(cfg, totals),
        "machine": _machine(),
        "versions": versions(),
        "disk": disk_use(cfg.out),
    }


def _command(cfg: Config) -> str:
    """What a person types to have the same done again."""
    words = index_words(cfg.source.kind, cfg.source.root, cfg.source.options)
    return shlex.join([*words, "--model", cfg.artifact.spec.model, "--out", str(cfg.out.absolute())])


def _engines(cfg: Config, totals: Totals) -> list[dict[str, Any]]:
    """One for each lane: what ran, and what the card of it says."""
    cards = sorted((card for _, card in cfg.artifact.cards()), key=lambda card: card.host == host_id())  # ours last
    vision = {f"{card.runtime} {card.precision}": card for card in cards if card.tower == "vision"}
    found = []
    for lane, engine in totals.engines.items():
        entry: dict[str, Any] = {"lane": lane, "engine": engine}
        if card := vision.get(engine.removesuffix(" (given up)")):
            entry |= {
                "host": card.host, "batch": card.batch, "rows_per_s": card.rows_per_s, "peak_share": card.peak_share,
                "parity": card.parity, "passed": card.passed, "verified": card.verified,
            }  # fmt: skip
        found.append(entry)
    return found


def _machine() -> dict[str, Any]:
    return {
        "cpu": cpu_info().get("model name", platform.machine()),
        "cores": physical_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [gpu.name for gpu in gpus()],
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # one of several that bring the same module
            continue
    return found


def disk_use(index: Path) -> Mapping[str, Mapping[str, int]]:
    """Files and bytes of each part of an index, links not followed, and what is free beside it."""
    parts: dict[str, dict[str, int]] = {}
    for name in ("shards", "segments", "generations", "runs"):
        sizes = [path.lstat().st_size for path in _files(index / name)]
        parts[name] = {"files": len(sizes), "bytes": sum(sizes)}
    manifest = [path.stat().st_size for path in index.glob("manifest.sqlite*")]
    parts["manifest"] = {"files": len(manifest), "bytes": sum(manifest)}
    parts["free"] = {"files": 0, "bytes": psutil.disk_usage(str(index)).free}
    return parts


def _files(folder: Path) -> Iterator[Path]:
    for home, _, names in os.walk(folder):
        for name in names:
            path = Path(home) / name
            if not path.is_symlink():
                yield path
