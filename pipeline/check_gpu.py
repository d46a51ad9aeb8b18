"""First contact with a GPU: ask it everything the GPU stages rest on, measure a little, write the answers down.

    python -m pipeline.check_gpu                                    # into docs/benchmarks/<date>-<gpu>/
    python -m pipeline.check_gpu --artifact artifacts/NAME --pictures DIR --out DIR

Writes gpu_check.json and gpu_check.md. Exit 0: every check ran and passed; 1: some did not (each says why); 2: no GPU.
Each check is a process of its own: a crash, a hang or a poisoned CUDA context costs one row, not the report. That
start costs some 5 s a check; the whole is meant to take under 4 minutes. This file imports no GPU library.
"""

from __future__ import annotations

import argparse
import ctypes
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
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

Status: TypeAlias = Literal["pass", "fail", "not run"]
LIMIT_S = 120.0
NEEDED = ("torch", "nvidia.nvimgcodec", "cvcuda", "onnxruntime")
LANES = tuple(f"{name}-cu{cuda}" for name in ("cvcuda", "nvidia-nvimgcodec", "tensorrt") for cuda in (12, 13))
DISTRIBUTIONS = ("torch", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "cuda-bindings", "nvidia-nvjpeg", *LANES)


class Check(NamedTuple):
    name: str
    question: str
    probe: str  # module:function


CHECKS = (
    Check("a size order", "Is the size of an image (width, height), also after tvresize?", "probes_gpu:size_order"),
    Check("b float16 out", "Does the crop write float16, and the same as float32?", "probes_gpu:float16_out"),
    Check("c as_images", "Does CV-CUDA take decoded images with an explicit format?", "probes_gpu:as_images"),
    Check("d row pitch", "Are pixels right when a row is no multiple of the alignment?", "probes_gpu:row_pitch"),
    Check("e pixel levels", "How far are the pixels from the reference preprocessing?", "probes_gpu:pixel_levels"),
    Check("e vectors", "How far are the vectors (needs --artifact)?", "measure_gpu:vectors"),
    Check("f refused", "Does a batch of broken files give None in each slot?", "probes_gpu:all_refused"),
    Check("f one", "Does a batch of one picture work?", "probes_gpu:one_picture"),
    Check("f thin", "Do 1 x N and N x 1 pictures work?", "probes_gpu:thin_pictures"),
    Check("f tiny", "Are pictures smaller than the target enlarged right?", "probes_gpu:tiny_pictures"),
    Check("g canary hybrid", "Does the CUDA decoder give true pixels, none all zero?", "probes_gpu:canary_hybrid"),
    Check("g canary engine", "Does the hardware engine give true pixels, none all zero?", "probes_gpu:canary_engine"),
    Check("g stream race", "Are pixels whole when the next batch is decoded at once?", "probes_gpu:stream_race"),
    Check("ort without torch", "Does the CUDA provider load with no torch (needs --artifact)?", "measure_gpu:no_torch"),
    Check("rate decode", "JPEG decode, images/s for each mix of decoders", "measure_gpu:decode_rates"),
    Check("rate preprocess", "Resize, crop and normalise, images/s", "measure_gpu:preprocess_rate"),
    Check("rate engine", "Vision graph on the CUDA provider, images/s (needs --artifact)", "measure_gpu:engine_rates"),
    Check("memory", "Does GPU memory stay flat over batches of ever new sizes?", "measure_gpu:memory"),
)


class NoGpu(Exception):
    """This host cannot run any check; the message says what is missing."""


def find_gpu() -> dict[str, Any]:
    """Name, compute capability and driver of device 0, asked of the driver itself.

    Raises:
        NoGpu: no driver, or no device.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NoGpu(f"the NVIDIA driver is not here ({error})") from error
    count, device, text = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    if (code := cuda.cuInit(0)) or (code := cuda.cuDeviceGetCount(ctypes.byref(count))) or not count.value:
        raise NoGpu(f"the NVIDIA driver is here but shows no device (code {code}): is one visible to this user?")
    numbers = {"cuda": ctypes.c_int(), "major": ctypes.c_int(), "minor": ctypes.c_int()}
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    cuda.cuDeviceGetName(text, len(text), device)
    cuda.cuDriverGetVersion(ctypes.byref(numbers["cuda"]))
    cuda.cuDeviceGetAttribute(ctypes.byref(numbers["major"]), 75, device)  # 75, 76: compute capability
    cuda.cuDeviceGetAttribute(ctypes.byref(numbers["minor"]), 76, device)
    return {
        "name": text.value.decode(errors="replace"),
        "devices": count.value,
        "compute_capability": f"{numbers['major'].value}.{numbers['minor'].value}",
        "driver": driver_version(),
        "driver_cuda": f"{numbers['cuda'].value // 1000}.{numbers['cuda'].value % 1000 // 10}",
        "NVIDIA_DRIVER_CAPABILITIES": os.environ.get("NVIDIA_DRIVER_CAPABILITIES", "unset"),
        "cpu_cores": len(os.sched_getaffinity(0)),
    }


def driver_version() -> str:
    if (smi := shutil.which("nvidia-smi")) is None:
        return "unknown (no nvidia-smi)"
    asked = subprocess.run([smi, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    return asked.stdout.split("\n")[0].strip() or f"unknown ({asked.stderr.strip()[:100]})"


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def missing() -> list[str]:
    """Packages the checks need that this Python does not have."""
    return [name for name in NEEDED if not _there(name)]


def _there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False


def run_one(check: Check, flags: list[str], limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Run one check in a child process; whatever happens to the child becomes a row."""
    command = [sys.executable, "-m", "pipeline.check_gpu", *flags, "--only", check.name]
    began = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        return row(check, "fail", f"did not come back in {limit_s:.0f} s", {"stderr": _tail(error.stderr)}, limit_s)
    seconds = time.monotonic() - began
    try:
        told: dict[str, Any] = json.loads(done.stdout.strip().split("\n")[-1])
    except ValueError:
        how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit {done.returncode}"
        return row(check, "fail", f"the process died: {how}", {"stderr": _tail(done.stderr)}, seconds)
    return row(check, told["status"], told["answer"], told["evidence"] | {"stderr": _tail(done.stderr)}, seconds)


def row(check: Check, status: Status, answer: str, evidence: dict[str, Any], seconds: float) -> dict[str, Any]:
    kept = {key: value for key, value in evidence.items() if value != ""}
    told = {"status": status, "answer": answer, "evidence": kept, "seconds": round(seconds, 1)}
    return check._asdict() | told


def _tail(text: str | bytes | None) -> str:
    text = text.decode(errors="replace") if isinstance(text, bytes) else text or ""
    return re.sub(r"\x1b\[[\d;]*m", "", text).strip()[-2000:]


def child(check: Check, job: Any) -> dict[str, Any]:
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


def write_report(out: Path, report: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "gpu_check.md").write_text(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    lines = [f"# GPU check: {report['gpu']['name']}, {report['date']}", "", f"`{report['command']}`", ""]
    lines += [f"- {key}: {value}" for key, value in (report["gpu"] | report["versions"]).items()]
    lines += ["", "| check | question | status | answer | s |", "|---|---|---|---|---|"]
    for one in report["checks"]:
        cells = (one["name"], one["question"], one["status"], one["answer"], one["seconds"])
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    lines.append("\nEvidence for each answer is in gpu_check.json.\n")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: docs/benchmarks/<date>-<gpu>")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="JPEG files to use beside the generated ones")
    parser.add_argument("--artifact", type=Path, metavar="DIR", help="exported model, for vectors and engine rates")
    parser.add_argument("--only", choices=[check.name for check in CHECKS], help="run one check here, print its JSON")
    return parser.parse_args()


def main() -> int:
    args = parse()
    try:
        gpu = find_gpu()
    except NoGpu as reason:
        also = f"; also missing: {', '.join(missing())}" if missing() else ""
        print(f"no GPU check here: {reason}{also}. See docs/gpu.md", file=sys.stderr)
        return 2
    if args.only:
        (check,) = [check for check in CHECKS if check.name == args.only]
        print(json.dumps(child(check, args)))
        return 0
    flags = [f"--{key}={value}" for key in ("pictures", "artifact") if (value := getattr(args, key))]
    today = datetime.date.today().isoformat()
    out = args.out or Path("docs/benchmarks") / f"{today}-{re.sub(r'[^a-z0-9]+', '-', gpu['name'].lower()).strip('-')}"
    rows = []
    for check in CHECKS:
        rows.append(run_one(check, flags))
        print(f"{rows[-1]['status']:8} {check.name:18} {rows[-1]['answer']}", flush=True)
    command = "python -m pipeline.check_gpu " + " ".join(sys.argv[1:])
    report = {"schema": 1, "date": today, "command": command, "gpu": gpu, "versions": versions(), "checks": rows}
    write_report(out, report)
    print(f"written: {out}/gpu_check.json, {out}/gpu_check.md")
    return 0 if all(one["status"] == "pass" for one in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
