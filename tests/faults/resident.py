"""A process that has imported everything and forks whole commands and their lanes: 0.3 s each, not 3.

    python resident.py         one order per line of stdin, one answer per line of stdout; see `Order` and `runs.Ran`

Nothing here has touched OpenMP or an engine, so forking is safe; what a fork does is the real command. With the shim
in LD_PRELOAD it can make any call of the run fail, or kill somebody in the middle of it. `Resident` is the client.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RUN_S_MAX = 120.0


@dataclass(frozen=True)
class Fault:
    """The `at`-th call below `under` fails with `error` (and later ones, if `sticky`) or kills the "run", or,
    counting the calls of others alone, the "lane" that makes it."""

    under: str
    at: int = 0  # 0: only count
    error: int = 0
    sticky: bool = False
    kills: str = ""
    reads: bool = False  # count reads instead of changes


@dataclass(frozen=True)
class Order:
    argv: list[str]
    module: str = "pipeline.index"
    fault: Fault | None = None
    kill_after_s: float | None = None
    kill_lane: bool = False  # kill a lane at that moment, not the run
    limits: dict[str, int] = field(default_factory=dict)  # RLIMIT name -> value
    memory_mb: int | None = None  # of address space, beyond what the run has when it begins
    patches: dict[str, object] = field(default_factory=dict)  # "module:name" -> value
    before: str = ""  # "module:function" that the run's process calls first
    clock_jumps_s: float = 0.0  # time.time() goes forth and back by that much


@dataclass(frozen=True)
class Outcome:
    code: int  # -9 when it was killed
    stdout: str
    stderr: str
    calls: int  # that the shim saw
    seconds: float
    orphans: bool  # something of the run was alive five seconds after it

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.stdout.strip().splitlines()[-1])
        return report


class Resident:
    """The client's side."""

    def __init__(self, shim: Path | None, env: dict[str, str] | None = None) -> None:
        own = {"LD_PRELOAD": str(shim)} if shim else {}
        path = os.pathsep.join(map(str, [HERE, HERE.parent, HERE.parents[1]]))
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "resident.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **(env or {}), **own, "PYTHONPATH": path},
        )  # fmt: skip

    def run(self, order: Order) -> Outcome:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(asdict(order)) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Resident:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def build_shim(folder: Path) -> Path:
    shim = folder / "shim.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(shim), str(HERE / "shim.c")]
    subprocess.run(command, check=True)
    return shim


# ---- the resident's side ------------------------------------------------------------------------------------------


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for name in (
        "pipeline.index",
        "pipeline.nightly.night",
        "pipeline.verify.command",
        "pipeline.generations",
        "numpy.random",
        "pipeline.lane_process",
        "pipeline.stages_cpu",
        "engines.ort",
        "PIL.Image",
    ):
        importlib.import_module(name)
    get_context = multiprocessing.get_context
    # Lanes are spawned, which costs them two seconds of imports; here they are forked with everything imported.
    multiprocessing.get_context = lambda method=None: get_context("fork")  # type: ignore[assignment]
    for line in sys.stdin:
        order = json.loads(line)
        order["fault"] = Fault(**order["fault"]) if order["fault"] else None
        answers.write(json.dumps(asdict(one_run(Order(**order)))) + "\n")
        answers.flush()


def one_run(order: Order) -> Outcome:
    start_s = time.monotonic()
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        read_end, write_end = os.pipe()  # the fork waits until the shim knows whom to kill
        child = os.fork()
        if child == 0:
            os.close(write_end)
            os.read(read_end, 1)
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            os._exit(in_fork(order))
        os.close(read_end)
        if order.fault:
            arm(order.fault, child)
        os.close(write_end)
        if order.kill_after_s is not None:
            time.sleep(order.kill_after_s)
            for victim in children_of(child) if order.kill_lane else [child]:
                with suppress(ProcessLookupError):  # it was faster
                    os.kill(victim, signal.SIGKILL)
        code = wait_for(child)
        calls = int(ctypes.CDLL(None).fault_calls()) if order.fault else 0
        if order.fault:
            arm(Fault("/nowhere"), 0)
        stdout.seek(0)
        stderr.seek(0)
        out, err = stdout.read().decode(), stderr.read().decode()
    return Outcome(code, out, err, calls, time.monotonic() - start_s, not alone_within(child, seconds=5))


def arm(fault: Fault, child: int) -> None:
    victim = ("", "run", "lane").index(fault.kills)
    ctypes.CDLL(None).fault_arm(
        fault.under.encode(), ctypes.c_long(fault.at), fault.error, int(fault.sticky), child, victim, int(fault.reads)
    )


def in_fork(order: Order) -> int:
    os.setpgid(0, 0)
    sys.stdin = open(os.devnull)  # noqa: SIM115 - until the end of the process
    for name, value in order.patches.items():
        module, _, attribute = name.partition(":")
        setattr(importlib.import_module(module), attribute, value)
    if order.before:
        module, _, attribute = order.before.partition(":")
        getattr(importlib.import_module(module), attribute)()
    for name, value in order.limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if order.memory_mb is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (order.memory_mb << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if order.clock_jumps_s:
        real, calls = time.time, iter(range(10**9))
        time.time = lambda: real() + order.clock_jumps_s * (1 if next(calls) % 2 else -1)
    try:
        return int(importlib.import_module(order.module).main(order.argv))
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 1
    except BaseException:  # noqa: BLE001 - as the interpreter would
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def children_of(pid: int) -> list[int]:
    return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(child: int) -> int:
    deadline_s = time.monotonic() + RUN_S_MAX
    while time.monotonic() < deadline_s:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -999


def alone_within(group: int, seconds: float) -> bool:
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.002)
    return False


if __name__ == "__main__":
    serve()
