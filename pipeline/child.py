"""A plain child process for what is hostile: bytes that make a library crash, hang or eat memory take it alone.

    child = Child.start("pipeline.report.thumbnails", start_s=20)    conn = confined(2 << 30)        # in its `__main__`
    child.conn.send_bytes(...); child.conn.recv_bytes()              conn.recv_bytes(); conn.send_bytes(...)

It is spawned by its own module, not by multiprocessing, which would run the caller's main module again. What comes back
is bytes and never a pickle: whoever has taken the child over must not get further.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import IO

LAST_WORDS_BYTES = 2000
END_S = 0.5  # it ends with its pipe, or has died already and is about to say how: better to know than our own kill


@dataclass
class Child:
    """The parent's side. `end` it whatever happened to it."""

    process: subprocess.Popen[bytes]
    conn: Connection
    stderr: IO[bytes]

    @classmethod
    def start(cls, module: str, start_s: float) -> Child:
        """
        Raises:
            ChildProcessError (an OSError): it did not say within `start_s` that it is ready.
        """
        ours, theirs = multiprocessing.Pipe()
        stderr = tempfile.TemporaryFile()  # noqa: SIM115 - until `end`
        with theirs:
            command = [sys.executable, "-m", module, str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=stderr)
        child = cls(process, ours, stderr)
        try:
            if not ours.poll(start_s):
                raise ChildProcessError(f"no process of {module} after {start_s:g} s")
            ours.recv_bytes()
        except (EOFError, OSError) as error:
            words = child.end()
            raise ChildProcessError(f"the process of {module} did not start: {words or error}") from None
        return child

    def end(self) -> str:
        """Kill it if it is still there; how it ended, and the last line that it wrote."""
        self.conn.close()
        try:
            self.process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
        code = self.process.wait()
        self.stderr.seek(max(0, self.stderr.seek(0, os.SEEK_END) - LAST_WORDS_BYTES))
        lines = self.stderr.read().decode(errors="replace").strip().splitlines()
        self.stderr.close()
        ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{ended}: {lines[-1]}" if lines else ended


def confined(memory_bytes: int) -> Connection:
    """In the child: limits, an end with the parent, no signals of a terminal; says that it is ready."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent decides
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    conn = Connection(int(sys.argv[1]))
    conn.send_bytes(b"ready")  # to a parent that died before we asked, this fails
    return conn


def die_with_parent() -> None:
    """Linux: from now on the kernel kills this process when its parent dies, however it dies."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
