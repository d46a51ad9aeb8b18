"""One contestant, one process: started, watched and measured from outside, so that all are measured alike."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from pipeline.bench.energy import joules_between, read_energy

LOOK_S = 0.25  # a look at the whole tree costs some milliseconds, of the same cores
THREADS = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class OutOfTime(Exception):
    """A part had to end before it was through; what was measured until then stays."""


class ChildFailed(Exception):
    """A contestant died, with the last of its words."""


class Limit:
    """The time that one part of the benchmarks may take, starts included."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._end_s = seconds, time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return self._end_s - time.monotonic()

    def check(self) -> None:
        if self.left_s <= 0:
            raise OutOfTime(f"not reached within the limit of {self.seconds:g} s")


class Measured(NamedTuple):
    result: Any  # the last line of its stdout, read as JSON
    wall_s: float
    cpu_s: float  # of all its threads, and of the child processes it has waited for
    peak_rss_mb: float  # of the process and all below it, at one moment
    joules: float | None


def run_measured(command: Sequence[object], limit: Limit, env: Mapping[str, str] | None = None) -> Measured:
    """
    Raises:
        OutOfTime: it was ended because the limit was reached. ChildFailed: it ended with a code, or said nothing.
    """
    limit.check()
    words = [str(word) for word in command]
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        before, start_s = read_energy(), time.monotonic()
        child = subprocess.Popen(
            words, stdout=stdout, stderr=stderr, env={**os.environ, **THREADS, **(env or {})}, start_new_session=True
        )
        peak, cpu_s, ended = 0, 0.0, os.pidfd_open(child.pid)
        try:
            while child.poll() is None:
                rss, used_s = _look(child.pid)
                peak, cpu_s = max(peak, rss), max(cpu_s, used_s)
                limit.check()
                select.select([ended], [], [], LOOK_S)
        finally:
            os.close(ended)
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # its own session, with all that it started
                child.wait()
        wall_s, joules = time.monotonic() - start_s, joules_between(before, read_energy())
        stdout.seek(0)
        stderr.seek(0)
        lines, errors = stdout.read().strip().splitlines(), stderr.read().strip()
    if child.returncode or not lines:
        raise ChildFailed(f"{' '.join(words[:6])} ... ended with {child.returncode}: {errors[-800:]}")
    return Measured(json.loads(lines[-1]), wall_s, cpu_s, peak / 1e6, joules)


def _look(pid: int) -> tuple[int, float]:
    """Resident bytes of a process and all below it, and their CPU seconds; those that ended between two looks count
    with whoever waited for them."""
    rss, cpu_s = 0, 0.0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        waited_for = process.cpu_times()
        cpu_s = waited_for.children_user + waited_for.children_system
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                rss, cpu_s = rss + one.memory_info().rss, cpu_s + sum(one.cpu_times()[:2])
    return rss, cpu_s


def last_json(command: list[str], env: Mapping[str, str] | None = None) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}: {done.stderr[-2000:]}")
    parsed: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return parsed


def index_command(root: Path, out: Path, model: str) -> list[str]:
    words = ["--source", "folder", "--root", str(root), "--out", str(out), "--model", model, "--json"]
    return [sys.executable, "-m", "pipeline.index", *words]
