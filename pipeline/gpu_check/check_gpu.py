"""`make gpu-check`: run the GPU tests, ask the GPU what its libraries really do, measure, and write it all down.

    python -m pipeline.gpu_check                                    # into docs/benchmarks/<date>-<gpu>/
    python -m pipeline.gpu_check --pictures DIR --out DIR --only "image stage"

Writes gpu_check.json and gpu_check.md, anew after each part, and plots at the end. Exit 0: every part ran and passed,
every figure is met; 1: not so, and the report says which and why; 2: no GPU; 130: ended early, what was done is
written. Each part is a process of its own with a time limit: a crash, a hang or a poisoned CUDA context costs one row,
less what it had measured by then. All of it ends within 8 minutes: what did not fit is a row that says so. This file
imports no GPU library.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

from engines.memory_gpu import gpu_problem, gpus
from pipeline.exits import INTERRUPTED
from pipeline.gpu_check.checks_gpu import ALONE_CHECKS, CANARY_CHECKS, CHECKS, TOGETHER_CHECKS, Check
from pipeline.gpu_check.report_gpu import unmet, write_report
from pipeline.gpu_check.rig_gpu import WHOLE_S, Job
from pipeline.hardware_share_gpu import VARIABLE

Status: TypeAlias = Literal["pass", "fail", "not run"]
TOTAL_S = WHOLE_S - 20.0  # what must be killed, and plots, take the rest
KILL_S, PLOTS_S = 5.0, 12.0
TOGETHER = 6  # processes at a time in the first phase: tests, two models, pictures, two questions
WORK_BYTES = 24 << 30  # a RAM disk with this much room holds corpus and models
NEEDED = ("torch", "transformers", "onnx", "nvidia.nvimgcodec", "cvcuda", "onnxruntime", "cv2", "pytest")
LANES = tuple(f"{name}-cu{cuda}" for name in ("cvcuda", "nvidia-nvimgcodec", "tensorrt") for cuda in (12, 13))
DISTRIBUTIONS = (
    *("torch", "transformers", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "cuda-bindings", "nvidia-nvjpeg"),
    *("opencv-python-headless", *LANES),
)


class Run:
    """All checks of one call, against one clock. What is done is saved at once: whoever ends it early has that much."""

    def __init__(self, flags: list[str], save: Callable[[list[dict[str, Any]]], None]) -> None:
        self.flags, self.save, self.began = flags, save, time.monotonic()
        self.rows = {check.name: row(check, "not run", "not reached before it was ended", {}, 0.0) for check in CHECKS}
        self.lock, self.live = threading.Lock(), set[subprocess.Popen[bytes]]()

    def all(self) -> None:
        pool = ThreadPoolExecutor(TOGETHER)
        try:
            list(pool.map(self.one, TOGETHER_CHECKS))
            self.choose_decoders()
            for check in ALONE_CHECKS:
                self.one(check)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def only(self, name: str) -> bool:
        """Whether one check passes, after what is prepared for it."""
        (asked,) = [check for check in CHECKS if check.name == name]
        before = [check for check in CHECKS if check.name.startswith("prepare ") and check != asked]
        statuses = {self.one(check)["status"] for check in before}
        if asked in ALONE_CHECKS:
            self.choose_decoders()
        return statuses | {self.one(asked)["status"]} == {"pass"}

    def choose_decoders(self) -> None:
        """One wrong decoder must not hide all measurements: those that come now do without the hardware's, if it is."""
        without, whole = [self.one(check)["status"] for check in CANARY_CHECKS]
        if (without, whole) == ("pass", "fail"):
            os.environ[VARIABLE] = "0"  # of every process that is started from here on
            print(f"measured from here on with {VARIABLE}=0, without the hardware decoder", flush=True)

    def one(self, check: Check) -> dict[str, Any]:
        left_s = TOTAL_S - (time.monotonic() - self.began)
        if left_s < check.limit_s / 2:
            words = f"{left_s:.0f} of {TOTAL_S:.0f} s were left, it may take {check.limit_s:.0f} s"
            done = row(check, "not run", f"{words}: python -m pipeline.gpu_check --only '{check.name}'", {}, 0.0)
        else:
            done = run_one(check, self.flags, min(check.limit_s, left_s), self.live)
        with self.lock:
            self.rows[check.name] = done
            self.save(list(self.rows.values()))
            print(f"{done['status']:8} {check.name:18} {done['answer']}", flush=True)
        return done

    def end(self) -> None:
        for process in list(self.live):
            end_group(process)


def run_one(check: Check, flags: list[str], limit_s: float, live: set[subprocess.Popen[bytes]]) -> dict[str, Any]:
    """Run one check in a child process; whatever happens to the child becomes a row. While it runs, it is in `live`."""
    command = [sys.executable, "-m", "pipeline.gpu_check", *flags, "--child", check.name, f"--limit={limit_s:.1f}"]
    began = time.monotonic()
    # Files, because whoever survives a child would hold its pipes open, and we would wait for their end.
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        # A session of its own, so that its own children (lanes, compilers) end with it.
        try:
            process = subprocess.Popen(command, stdout=stdout, stderr=stderr, start_new_session=True)
        except OSError as error:
            return row(check, "fail", f"could not be started: {error}", {}, 0.0)
        live.add(process)
        end = ""
        try:
            if code := process.wait(limit_s):
                end = f"the process died: {signal.Signals(-code).name if code < 0 else f'exit {code}'}"
        except subprocess.TimeoutExpired:
            end = f"did not come back in {limit_s:.0f} s"
        finally:
            end_group(process)
            live.discard(process)
        lines, words = (_text(file) for file in (stdout, stderr))
    evidence, told = _told(lines)
    evidence |= {"stderr": re.sub(r"\x1b\[[\d;]*m", "", words).strip()[-2000:]}
    seconds = time.monotonic() - began
    if told is None:
        return row(check, "fail", end or "the process said nothing", evidence, seconds)
    answer = f"{told['answer']} (then {end})" if end else told["answer"]  # as when a library fails while it is unloaded
    return row(check, told["status"], answer, evidence, seconds)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all of its group. One that hangs in the driver does not even die: it is left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILL_S)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _told(lines: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """All evidence that a child gave, and its finding, if it came to one: see `rig_gpu.tell`."""
    evidence: dict[str, Any] = {}
    finding = None
    for line in lines.splitlines():
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if not isinstance(told, dict) or not isinstance(told.get("evidence"), dict):
            continue
        for key, value in told["evidence"].items():
            both = isinstance(value, dict) and isinstance(evidence.get(key), dict)
            evidence[key] = evidence[key] | value if both else value
        if {"status", "answer"} <= told.keys():
            finding = told
    return evidence, finding


def row(check: Check, status: Status, answer: str, evidence: dict[str, Any], seconds: float) -> dict[str, Any]:
    kept = {key: value for key, value in evidence.items() if value != ""}
    told = {"status": status, "answer": answer, "evidence": kept, "seconds": round(seconds, 1)}
    return check._asdict() | told


def child(check: Check, job: Job) -> dict[str, Any]:
    """What the child process prints: the finding, or why there is none."""
    # Importing by name keeps this file free of GPU libraries; the others load theirs inside functions only.
    rig = importlib.import_module("pipeline.gpu_check.rig_gpu")
    module, function = check.probe.split(":")
    try:
        finding = getattr(importlib.import_module(f"pipeline.gpu_check.{module}"), function)(job)
    except rig.CannotRun as reason:
        return {"status": "not run", "answer": str(reason), "evidence": {}}
    except Exception as error:  # noqa: BLE001  an unknown library on unknown hardware: any error is the answer
        return {"status": "fail", "answer": f"{type(error).__name__}: {error}"[:600], "evidence": {}}
    return {"status": "pass" if finding.ok else "fail", "answer": finding.answer, "evidence": finding.evidence}


def describe() -> dict[str, Any]:
    """The first GPU of this host; there is one. And what in the environment decides what it does."""
    first = gpus()[0]
    return {
        "name": first.name,
        "devices": len(gpus()),
        "sm": first.sm,
        "memory_mib": first.memory_bytes >> 20,
        "driver": first.driver,
        **{name: os.environ.get(name, "unset") for name in ("NVIDIA_DRIVER_CAPABILITIES", VARIABLE)},
        "cpu_cores": len(os.sched_getaffinity(0)),
    }


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def missing() -> list[str]:
    """Packages that some check needs and this Python does not have."""
    return [name for name in NEEDED if not _there(name)]


def _there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False


def work_folder() -> str:
    """Scratch space, in memory where a RAM disk has the room: disks take 10 GB at their own pace."""
    ram = Path("/dev/shm")
    roomy = ram.is_dir() and os.access(ram, os.W_OK) and shutil.disk_usage(ram).free >= WORK_BYTES
    return tempfile.mkdtemp(prefix="nightjar-gpu-check-", dir=ram if roomy else None)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m pipeline.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [check.name for check in CHECKS]
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: docs/benchmarks/<date>-<gpu>")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="JPEG files to ask about beside generated ones")
    parser.add_argument("--only", choices=names, help="one check, after what is prepared for it; nothing is written")
    parser.add_argument("--child", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=WHOLE_S, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    if problem := gpu_problem():
        also = f". Also missing: {', '.join(missing())}" if missing() else ""
        print(f"no GPU check here: {problem}{also}. See docs/gpu.md", file=sys.stderr)
        return 2
    if args.child:
        (check,) = [check for check in CHECKS if check.name == args.child]
        print(json.dumps(child(check, Job(args.work, args.pictures, args.limit))))
        return 0
    today = datetime.date.today().isoformat()
    command = " ".join(["python -m pipeline.gpu_check", *sys.argv[1:]])
    report = {"schema": 2, "date": today, "command": command, "versions": versions()}
    name = re.sub(r"[^a-z0-9]+", "-", describe()["name"].lower()).strip("-")
    out = args.out or Path("docs/benchmarks") / f"{today}-{name}"

    def save(rows: list[dict[str, Any]]) -> None:
        if not args.only:
            write_report(out, report | {"gpu": describe(), "checks": rows})

    work = work_folder()
    run = Run([f"--work={work}", *([f"--pictures={args.pictures}"] if args.pictures else [])], save)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a job that is ended from outside is ended as by Ctrl-C
    try:
        if args.only:
            return 0 if run.only(args.only) else 1
        run.all()
    except KeyboardInterrupt:
        print(f"ended early; what is done is in {out}", file=sys.stderr)
        return INTERRUPTED
    finally:
        run.end()
        shutil.rmtree(work, ignore_errors=True)
    draw(out)
    print(f"written: {', '.join(str(path) for path in sorted(out.iterdir()))}")
    rows = list(run.rows.values())
    return 0 if all(one["status"] == "pass" for one in rows) and not unmet(rows) else 1


def draw(out: Path) -> None:
    """Plots, in a process of their own: nothing that goes wrong there may cost the report."""
    try:
        subprocess.run([sys.executable, "-m", "pipeline.gpu_check.report_gpu", str(out)], timeout=PLOTS_S)
    except subprocess.TimeoutExpired:
        print(f"no plots in {PLOTS_S:.0f} s: python -m pipeline.gpu_check.report_gpu {out}", file=sys.stderr)
