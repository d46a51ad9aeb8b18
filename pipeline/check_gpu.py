"""`make gpu-check`: run the GPU tests, ask the GPU what its libraries really do, measure, and write it all down.

    python -m pipeline.check_gpu                                    # into docs/benchmarks/<date>-<gpu>/
    python -m pipeline.check_gpu --pictures DIR --out DIR --only "image stage"

Writes gpu_check.json, gpu_check.md and plots. Exit 0: every part ran and passed, every figure is met; 1: not so, and
the report says which and why; 2: no GPU. Tests, questions and preparation run beside each other, measurements one by
one. Each part is a process of its own with a time limit: a crash, a hang or a poisoned CUDA context costs one row. All
of it ends within 8 minutes: what did not fit is a row that says so. This file imports no GPU library.
"""

from __future__ import annotations

import argparse
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
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from engines.memory_gpu import gpu_problem, gpus
from pipeline.report_gpu import unmet, write_report
from pipeline.rig_gpu import Job

Status: TypeAlias = Literal["pass", "fail", "not run"]
TOTAL_S = 460.0  # of 480: the report takes the rest
TOGETHER = 6  # processes at a time in the first phase: tests, two models, pictures, two questions
WORK_BYTES = 24 << 30  # a RAM disk with this much room holds corpus and models
NEEDED = ("torch", "transformers", "onnx", "nvidia.nvimgcodec", "cvcuda", "onnxruntime", "cv2", "pytest")
LANES = tuple(f"{name}-cu{cuda}" for name in ("cvcuda", "nvidia-nvimgcodec", "tensorrt") for cuda in (12, 13))
DISTRIBUTIONS = (
    *("torch", "transformers", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "cuda-bindings", "nvidia-nvjpeg"),
    *("opencv-python-headless", *LANES),
)


class Check(NamedTuple):
    name: str
    question: str
    probe: str  # module:function
    limit_s: float = 60.0


# Order of both: what takes longest, or matters most, first.
TOGETHER_CHECKS = (
    Check("prepare ViT-L-14", "Random weights and every GPU engine of this host", "prepare_gpu:l14", 165),
    Check("prepare ViT-B-32", "Random weights and every GPU engine of this host", "prepare_gpu:b32", 160),
    Check("tests", "Do the GPU tests pass, none skipped for want of a GPU?", "probes_gpu:gpu_tests", 165),
    Check("prepare pictures", "Generated JPEGs, and a corpus of them", "prepare_gpu:pictures", 120),
    Check("a size order", "Is the size of an image (width, height), also after tvresize?", "probes_gpu:size_order"),
    Check("b float16 out", "Does the crop write float16, and the same as float32?", "probes_gpu:float16_out"),
    Check("c as_images", "Does CV-CUDA take decoded images with an explicit format?", "probes_gpu:as_images"),
    Check("d row pitch", "Are pixels right when a row is no multiple of the alignment?", "probes_gpu:row_pitch"),
    Check("e pixel levels", "How far are the pixels from the reference preprocessing?", "probes_gpu:pixel_levels"),
    Check("f refused", "Does a batch of broken files give None in each slot?", "probes_gpu:all_refused"),
    Check("f one", "Does a batch of one picture work?", "probes_gpu:one_picture"),
    Check("f thin", "Do 1 x N and N x 1 pictures work?", "probes_gpu:thin_pictures"),
    Check("f tiny", "Are pictures smaller than the target enlarged right?", "probes_gpu:tiny_pictures"),
    Check("g canary hybrid", "Does the CUDA decoder give true pixels, none all zero?", "probes_gpu:canary_hybrid"),
    Check("g canary engine", "Does the hardware engine give true pixels, none all zero?", "probes_gpu:canary_engine"),
    Check("g stream race", "Are pixels whole when the next batch is decoded at once?", "probes_gpu:stream_race"),
)
ALONE_CHECKS = (
    Check("index B/32", "`pipeline.index` from the page cache, images/s", "pipelines_gpu:index_b32", 90),
    Check("pipelines", "The three pipelines that Bing published, images/s", "pipelines_gpu:pipelines", 60),
    Check("image stage", "Decode and preprocess a batch of 32, ms", "measure_gpu:image_stage", 45),
    Check("rates B/32", "Decode, preprocess, model, texts: each alone, rows/s", "measure_gpu:rates_b32", 60),
    Check("latency", "One picture, bytes to vector, batch 1, ms", "measure_gpu:latency", 40),
    Check("memory", "GPU memory of a B/32 lane; flat over 1,000 batches?", "measure_gpu:memory", 60),
    Check("index L/14", "`pipeline.index` from the page cache, images/s", "pipelines_gpu:index_l14", 75),
    Check("rates L/14", "Model alone, images/s", "measure_gpu:rates_l14", 45),
    Check("replicas", "1, 2 and 4 engines on one GPU, images/s", "pipelines_gpu:replicas", 75),
    Check("decode mixes", "JPEG decode for each mix of decoders, images/s", "measure_gpu:decode_mixes", 45),
)
CHECKS = TOGETHER_CHECKS + ALONE_CHECKS


class Run:
    """All checks of one call, against one clock."""

    def __init__(self, flags: list[str]) -> None:
        self.flags, self.began = flags, time.monotonic()

    def all(self) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(TOGETHER) as pool:
            together = list(pool.map(self.one, TOGETHER_CHECKS))
        return together + [self.one(check) for check in ALONE_CHECKS]

    def one(self, check: Check) -> dict[str, Any]:
        left_s = TOTAL_S - (time.monotonic() - self.began)
        if left_s < check.limit_s / 2:
            words = f"{left_s:.0f} of {TOTAL_S:.0f} s were left, it may take {check.limit_s:.0f} s"
            done = row(check, "not run", f"{words}: python -m pipeline.check_gpu --only '{check.name}'", {}, 0.0)
        else:
            done = run_one(check, self.flags, min(check.limit_s, left_s))
        print(f"{done['status']:8} {check.name:18} {done['answer']}", flush=True)
        return done


def run_one(check: Check, flags: list[str], limit_s: float) -> dict[str, Any]:
    """Run one check in a child process; whatever happens to the child becomes a row."""
    command = [sys.executable, "-m", "pipeline.check_gpu", *flags, "--child", check.name]
    began = time.monotonic()
    # A session of its own, so that at the limit its own children (lanes, compilers) go too.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            _, stderr = process.communicate()
            return row(check, "fail", f"did not come back in {limit_s:.0f} s", {"stderr": _tail(stderr)}, limit_s)
    seconds = time.monotonic() - began
    try:
        told: dict[str, Any] = json.loads(stdout.strip().split("\n")[-1])
    except ValueError:
        code = process.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit {code}"
        return row(check, "fail", f"the process died: {how}", {"stderr": _tail(stderr)}, seconds)
    return row(check, told["status"], told["answer"], told["evidence"] | {"stderr": _tail(stderr)}, seconds)


def row(check: Check, status: Status, answer: str, evidence: dict[str, Any], seconds: float) -> dict[str, Any]:
    kept = {key: value for key, value in evidence.items() if value != ""}
    told = {"status": status, "answer": answer, "evidence": kept, "seconds": round(seconds, 1)}
    return check._asdict() | told


def _tail(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text).strip()[-2000:]


def child(check: Check, job: Job) -> dict[str, Any]:
    """What the child process prints: the finding, or why there is none."""
    # Importing by name keeps this file free of GPU libraries; the others load theirs inside functions only.
    rig = importlib.import_module("pipeline.rig_gpu")
    module, function = check.probe.split(":")
    try:
        finding = getattr(importlib.import_module(f"pipeline.{module}"), function)(job)
    except rig.CannotRun as reason:
        return {"status": "not run", "answer": str(reason), "evidence": {}}
    except Exception as error:  # noqa: BLE001  an unknown library on unknown hardware: any error is the answer
        return {"status": "fail", "answer": f"{type(error).__name__}: {error}"[:600], "evidence": {}}
    return {"status": "pass" if finding.ok else "fail", "answer": finding.answer, "evidence": finding.evidence}


def describe() -> dict[str, Any]:
    """The first GPU of this host; there is one."""
    first = gpus()[0]
    return {
        "name": first.name,
        "devices": len(gpus()),
        "sm": first.sm,
        "memory_mib": first.memory_bytes >> 20,
        "driver": first.driver,
        "NVIDIA_DRIVER_CAPABILITIES": os.environ.get("NVIDIA_DRIVER_CAPABILITIES", "unset"),
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
        "python -m pipeline.check_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [check.name for check in CHECKS]
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: docs/benchmarks/<date>-<gpu>")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="JPEG files to ask about beside generated ones")
    parser.add_argument("--only", choices=names, help="one check, after what is prepared for it; nothing is written")
    parser.add_argument("--child", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    if problem := gpu_problem():
        also = f". Also missing: {', '.join(missing())}" if missing() else ""
        print(f"no GPU check here: {problem}{also}. See docs/gpu.md", file=sys.stderr)
        return 2
    if args.child:
        (check,) = [check for check in CHECKS if check.name == args.child]
        print(json.dumps(child(check, Job(args.work, args.pictures))))
        return 0
    work = work_folder()
    try:
        run = Run([f"--work={work}", *([f"--pictures={args.pictures}"] if args.pictures else [])])
        if args.only:
            rows = [run.one(check) for check in CHECKS if check.name == args.only or check.name.startswith("prepare ")]
        else:
            rows = run.all()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    today = datetime.date.today().isoformat()
    command = " ".join(["python -m pipeline.check_gpu", *sys.argv[1:]])
    report = {"schema": 2, "date": today, "command": command, "gpu": describe(), "versions": versions(), "checks": rows}
    passed = all(one["status"] == "pass" for one in rows)
    if args.only:
        return 0 if passed else 1
    name = re.sub(r"[^a-z0-9]+", "-", describe()["name"].lower()).strip("-")
    written = write_report(args.out or Path("docs/benchmarks") / f"{today}-{name}", report)
    print(f"written: {', '.join(map(str, written))}")
    return 0 if passed and not unmet(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
