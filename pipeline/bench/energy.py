"""Joules of the machine while something runs, where it tells: RAPL for the packages, NVML for the GPUs.

Virtual machines hide both, and RAPL wants root since 2020. Then there is a reason instead of a number.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

RAPL = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"


class Reading(NamedTuple):
    """Counters that only grow, until they begin again at `wrap_j`."""

    joules: dict[str, float]
    wrap_j: dict[str, float]
    missing: str  # why there is nothing, or not all


def read_energy(rapl: Path = RAPL) -> Reading:
    joules, wrap_j, missing = {}, {}, []
    zones = sorted(rapl.glob("intel-rapl:[0-9]"))  # packages; what is within them is counted there
    if not zones:
        missing.append(f"no RAPL in {rapl}")
    for zone in zones:
        try:
            joules[zone.name] = int((zone / "energy_uj").read_text()) / 1e6
            wrap_j[zone.name] = int((zone / "max_energy_range_uj").read_text()) / 1e6
        except OSError as error:
            missing.append(f"RAPL: {error}")
    try:
        joules |= _nvml_joules()
    except OSError as error:
        missing.append(f"no NVML: {error}")
    return Reading(joules, wrap_j, "; ".join(missing))


def joules_between(before: Reading, after: Reading) -> float | None:
    """None where nothing could be read."""
    parts = []
    for name, then in before.joules.items():
        used = after.joules.get(name, then) - then
        parts.append(used if used >= 0 else used + before.wrap_j.get(name, 0.0))
    return sum(parts) if parts else None


def _nvml_joules() -> dict[str, float]:
    """
    Raises:
        OSError: the library is not here, or does not answer.
    """
    nvml, count, found = ctypes.CDLL(NVML), ctypes.c_uint(), {}
    if code := nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        raise OSError(f"NVML error {code}")
    for index in range(count.value):
        handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
        code = nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
        if code := code or nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            raise OSError(f"NVML error {code} from GPU {index}")
        found[f"gpu:{index}"] = millijoules.value / 1e3
    return found
