"""The service as a user runs it: a process of its own, on a free port."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx2

PLENTY = ("--rate", "100000")


@dataclass
class Service:
    process: subprocess.Popen[str]
    http: httpx2.Client
    stderr: IO[str]

    @property
    def url(self) -> str:
        return str(self.http.base_url)

    @property
    def log(self) -> str:
        self.stderr.seek(0)
        return self.stderr.read()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=30)


@contextmanager
def running(index: Path, *args: str, env: dict[str, str] | None = None) -> Iterator[Service]:
    command = [sys.executable, "-m", "pipeline.serve", "--out", str(index), "--port", "0", *args]
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, **(env or {})}
        )
        assert process.stdout is not None
        with process, process.stdout:
            try:
                line = process.stdout.readline()
                stderr.seek(0)
                assert line, stderr.read()
                with httpx2.Client(base_url=json.loads(line)["address"], timeout=30) as http:
                    yield Service(process, http, stderr)
            finally:
                if process.poll() is None:
                    process.kill()
