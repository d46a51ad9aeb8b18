"""What this host is and what it could do at best: CPU identity, instruction sets, usable cores, measured GEMM peak.

An engine is compiled for one CPU, so its card names `host_id()` and any other host refuses it. The GEMM peak is
measured in the same run as the engine it is compared with: on shared machines only such ratios mean something.
Needs the standard library; the peak needs libtorch (loaded without Python's torch, see engines.aoti).
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import re
import shutil
import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engines.spec import Precision

# Instruction sets that change what a compiler or a GEMM library emits. Anything else may differ between two hosts.
CODE_FLAGS = re.compile(r"^(sse4_[12]|avx\w*|fma|f16c|bmi[12]|amx\w*|asimd\w*|sve\w*|bf16|i8mm)$")
# The few worth reading in a folder name.
NAMED_FLAGS = ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx2", "sve", "asimd")
BF16_FLAGS = ("amx_bf16", "avx512_bf16")
INT8_FLAGS = ("amx_int8", "avx512_vnni", "avx_vnni")
GEMM_SIZE = 1536  # large enough for full speed, small enough (7 to 60 ms on 2 cores) to take turns with an engine
PRODUCTS_MIN = 3
CPU_INFO = Path("/proc/cpuinfo")
CGROUPS, MY_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@lru_cache(maxsize=1)
def cpu_info() -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo; empty where there is none."""
    if not CPU_INFO.is_file():
        return {}
    first = CPU_INFO.read_text().split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def cpu_flags() -> frozenset[str]:
    info = cpu_info()
    return frozenset((info.get("flags") or info.get("Features") or "").split())


def host_id() -> str:
    """Such as `intel-6-85-7-avx512_vnni-1c0ffee5`: vendor, family, model, stepping, best flag, digest of the flags."""
    info = cpu_info()
    vendor = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}.get(info.get("vendor_id", ""), platform.machine())
    numbers = [info.get(name) for name in ("cpu family", "model", "stepping", "CPU part", "CPU revision")]
    flags = cpu_flags()
    best = next((flag for flag in NAMED_FLAGS if flag in flags), "plain")
    code_flags = " ".join(sorted(flag for flag in flags if CODE_FLAGS.match(flag)))
    digest = hashlib.sha256(f"{platform.machine()} {code_flags}".encode()).hexdigest()[:8]
    return "-".join([vendor, *(number for number in numbers if number), best, digest]).lower()


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; elsewhere libraries emulate it, several times slower than fp32."""
    return not cpu_flags().isdisjoint(BF16_FLAGS)


def has_int8() -> bool:
    """Whether this CPU adds 8-bit products in 32 bits; older ones add pairs in 16 bits, which overflow."""
    return not cpu_flags().isdisjoint(INT8_FLAGS)


def has_avx512() -> bool:
    """Whether levels.c runs here."""
    return {"avx512f", "avx512dq"} <= cpu_flags()


def has_avx512_bf16() -> bool:
    """Whether attention.c runs here."""
    return has_avx512() and "avx512_bf16" in cpu_flags()


def has_product_kernel() -> bool:
    """Whether product.c runs here and is faster than oneDNN: measured on AMD alone, and never on a CPU with AMX."""
    return cpu_info().get("vendor_id") == "AuthenticAMD" and {"avx512_bf16", "avx512_vnni"} <= cpu_flags()


def physical_cores() -> int:
    """Cores this process may use: its affinity, two hardware threads counted once, and the cgroup's CPU quota."""
    allowed = os.sched_getaffinity(0)
    cores = {_core(cpu) for cpu in allowed}
    return max(1, math.ceil(min(len(cores), _cgroup_cpus())))


def _core(cpu: int) -> tuple[str, str]:
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    if not (topology / "core_id").is_file():
        return "", str(cpu)
    return (topology / "physical_package_id").read_text().strip(), (topology / "core_id").read_text().strip()


def cgroup_files(name: str) -> list[Path]:
    """`name` in the control group of this process and in all above it: each of them limits it.

    In a container the group itself is mounted at the root. A systemd unit sees its whole host there and lies deeper.
    """
    lines = MY_CGROUPS.read_text().splitlines() if MY_CGROUPS.is_file() else []
    controller, _, file = name.rpartition("/")  # cgroup v1 has a tree for each, v2 one without a name
    mine = next((line.split(":", 2)[2] for line in lines if controller in line.split(":", 2)[1].split(",")), "/")
    home = CGROUPS / controller / mine.lstrip("/")
    homes = [folder for folder in (home, *home.parents) if folder.is_relative_to(CGROUPS / controller)]
    return [folder / file for folder in homes if (folder / file).is_file()]


def _cgroup_cpus() -> float:
    """CPUs the quota allows; infinite where none is set (cgroup v2, then v1)."""
    quotas = [path.read_text().split() for path in cgroup_files("cpu.max")]
    for path in cgroup_files("cpu/cpu.cfs_quota_us"):
        quotas.append([path.read_text().strip(), path.with_name("cpu.cfs_period_us").read_text().strip()])
    return min((int(quota) / int(period) for quota, period in quotas if quota not in ("max", "-1")), default=math.inf)


def cxx_compiler() -> str | None:
    """Path of the C++ compiler that AOTInductor calls (`CXX`, else g++), or None where there is none."""
    return shutil.which(os.environ.get("CXX") or "g++")


def gemm_peak_gflops(precision: Precision, threads: int, seconds: float = 0.2) -> float:
    """Median speed of square matrix products in libtorch for so long: the ceiling a model made of GEMMs can reach."""
    multiply = _square_product(precision, threads)
    taken_s: list[float] = []
    while len(taken_s) < PRODUCTS_MIN or sum(taken_s) < seconds:
        start = time.perf_counter()
        multiply()
        taken_s.append(time.perf_counter() - start)
    return 2 * GEMM_SIZE**3 / statistics.median(taken_s) / 1e9


@lru_cache(maxsize=3)
def _square_product(precision: Precision, threads: int) -> Callable[[], None]:
    from engines.aoti import open_libtorch

    multiply = open_libtorch().square_product(precision, GEMM_SIZE, threads)
    multiply()  # the first call starts the thread team and finds the kernel
    return multiply
