"""On the path of a run and its lanes, this makes engines and readers behave as ordered in the file $FAKE_LANES.

    {"rows_per_s": {"cpu/0": 20}, "batch": 4,   engines of that speed, on no core at all; the rows they did and when
     "start_together": 3,                       go into span-*.json beside the orders, and all lanes begin at once;
                                                their CPUs are in there-*
     "nan_every": 40,                           every so many rows have no finite vector
     "read_deadline_s": 3,                      of one picture's bytes
     "decode_s": 0.2,                           more than it takes, for each picture
     "engine_dies_s": 0.1,                      after its first batch
     "kill_rows": 2,                            of a batch, or more: with those the lane is killed
     "kill_lane": "cpu/0", "wait_for_kill": 2,  whatever it decodes; others wait until JUDGED_S after its third death
     "kills": 2,                                at most, of all lanes
     "write_s": 2,                              of a shard, beside which `writing` appears
     "write_dies": true,                        after that
     "write_fails": "cpu/0",                    none is written before there is a file `write`, and by this lane none
     "memory_bytes": 300000000}                 of this host

A picture whose bytes end with READ-ABORT takes the process down when it is read, READ-HANG never comes back. READ-KILL
and DECODE-KILL have it killed from outside, as the kernel does for want of memory.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import pipeline.lanes
import pipeline.stages_cpu
import pipeline.store
from pipeline import devices
from pipeline.sources import folder, parquet_rows

HOME = Path(os.environ["FAKE_LANES"]).parent
ORDERS: dict[str, Any] = json.loads(Path(os.environ["FAKE_LANES"]).read_text())
open_lane_engine = devices.open_lane_engine
decode, write_shard = pipeline.stages_cpu.decode, pipeline.store.write_shard
lane = ""  # the one this process is

if "read_deadline_s" in ORDERS:
    pipeline.lanes.READ_DEADLINE_S = ORDERS["read_deadline_s"]
if "memory_bytes" in ORDERS:
    devices.memory_limit_bytes = lambda: ORDERS["memory_bytes"]


JUDGED_S = 6.0  # the coordinator has judged a kill, and another start and death of that lane, if there is one
dying = threading.Lock()  # of several threads that decode, one is killed: each kill counts once


def be_killed() -> None:
    with dying:
        for number in range(ORDERS.get("kills", 1_000)):
            if not (told := HOME / f"killed-{number}").exists():
                told.touch()
                os.kill(os.getpid(), signal.SIGKILL)


def _s_since(path: Path) -> float:
    return time.time() - path.stat().st_mtime if path.exists() else 0.0


class FakeEngine:
    """The real one, whose results are late or not finite."""

    def __init__(self, inside: Any, name: str) -> None:
        self.inside, self.card, self.slots = inside, inside.card, inside.slots
        self.span = HOME / f"span-{name.replace('/', '-')}.json"
        self.rows_per_s = ORDERS.get("rows_per_s", {}).get(name)
        self.rows, self.first_s, self.free_s, self.seen = 0, 0.0, 0.0, 0
        self.done_s = dict.fromkeys(range(self.slots), 0.0)

    def input(self, slot: int) -> Any:
        return self.inside.input(slot)

    def launch(self, slot: int, n: int) -> None:
        now_s = time.monotonic()
        self.first_s = self.first_s or now_s
        if self.rows_per_s:
            self.free_s = max(now_s, self.free_s) + self.card.batch / self.rows_per_s  # a short batch takes as long
            self.done_s[slot] = self.free_s
        self.rows += n
        self.inside.launch(slot, n)
        if n >= ORDERS.get("kill_rows", 1_000_000):
            time.sleep(ORDERS.get("decode_s", 0))  # the next batch is being decoded
            be_killed()
        if "engine_dies_s" in ORDERS:
            threading.Timer(ORDERS["engine_dies_s"], os.kill, (os.getpid(), signal.SIGSEGV)).start()
            time.sleep(60)

    def result(self, slot: int) -> Any:
        emb_nd = self.inside.result(slot)
        while "wait_for_kill" in ORDERS and _s_since(HOME / f"killed-{ORDERS['wait_for_kill']}") < JUDGED_S:
            time.sleep(0.01)
        time.sleep(max(0.0, self.done_s[slot] - time.monotonic()))
        span = {"rows": self.rows, "first_s": self.first_s, "last_s": time.monotonic()}
        if self.rows_per_s:
            self.span.write_text(json.dumps(span))
        if every := ORDERS.get("nan_every"):
            self.seen += len(emb_nd)
            emb_nd[[row for row in range(len(emb_nd)) if (self.seen - len(emb_nd) + row + 1) % every == 0]] = np.nan
        return emb_nd


def open_fake(spec: Any) -> Any:
    from dataclasses import replace

    global lane
    lane = spec.name
    engine = open_lane_engine(replace(spec, batch=ORDERS.get("batch"), engine_threads=1) if "batch" in ORDERS else spec)
    if lanes := ORDERS.get("start_together"):
        draft = HOME / f"starting-{spec.name.replace('/', '-')}"
        draft.write_text(json.dumps(sorted(os.sched_getaffinity(0))))
        draft.rename(HOME / draft.name.replace("starting", "there"))
        while len(list(HOME.glob("there-*"))) < lanes:
            time.sleep(0.01)
    return FakeEngine(engine, spec.name)


def fake_read(read: Any) -> Any:
    def read_fake(self: Any, locator: bytes, size_bytes: int) -> bytes:
        encoded: bytes = read(self, locator, size_bytes)
        if encoded.endswith(b"READ-ABORT"):
            os.abort()
        if encoded.endswith(b"READ-HANG"):
            time.sleep(3600)
        if encoded.endswith(b"READ-KILL"):
            be_killed()
        return encoded

    return read_fake


def fake_decode(encoded: bytes, *args: Any) -> Any:
    time.sleep(ORDERS.get("decode_s", 0))
    if encoded.endswith(b"DECODE-KILL") or lane == ORDERS.get("kill_lane"):
        be_killed()
    return decode(encoded, *args)


def fake_write(path: Path, *args: Any) -> Any:
    while "write_fails" in ORDERS and not (HOME / "write").exists():
        time.sleep(0.01)
    if lane == ORDERS.get("write_fails"):
        raise RuntimeError("no shard today")
    if "write_s" in ORDERS:
        (HOME / f"writing-{path.stem}").touch()
        time.sleep(ORDERS["write_s"])
    if "write_dies" in ORDERS:
        os.abort()
    return write_shard(path, *args)


pipeline.stages_cpu.decode, pipeline.store.write_shard = fake_decode, fake_write
devices.open_lane_engine = open_fake
for source in (folder.Folder, parquet_rows.ParquetRows):
    source.read = fake_read(source.read)  # type: ignore[method-assign]
