"""Promise: threads of a lane that compute never are more than its cores, and none of them waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from engines import turns
from engines.aoti import AotiCpuEngine
from engines.build import Report
from engines.ort import OrtCpuEngine
from engines.spec import Artifact, Preprocess
from engines.turns import Turns
from pipeline import stages_cpu
from pipeline.batch import Batch
from pipeline.stages_cpu import CpuStages
from tests.pictures import noisy_jpeg

CORES, ROWS, RUNS = 2, 24, 6
HOLD_S = 0.004  # long enough that others come along


class Busy:
    """Cores in use at a time, counted by those who use them."""

    def __init__(self) -> None:
        self.most, self._now, self._lock = 0, 0, threading.Lock()

    @contextmanager
    def on(self, cores: int) -> Iterator[None]:
        with self._lock:
            self._now += cores
            self.most = max(self.most, self._now)
        time.sleep(HOLD_S)
        yield
        with self._lock:
            self._now -= cores


@pytest.fixture
def artifact(all_engines: Report) -> Artifact:
    return all_engines.artifact


def test_whoever_wants_cores_gets_them_and_never_too_many() -> None:
    shared, busy = Turns(3), Busy()

    def work(cores: int) -> None:
        for _ in range(10):
            with shared.take(cores), busy.on(min(cores, 3)):
                pass

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, cores) for cores in (1, 2, 3, 5, 1, 2, 3, 1)]:
            done.result(timeout=60)
    assert busy.most == 3


def test_a_core_comes_back_from_a_failure() -> None:
    shared = Turns(1)
    with pytest.raises(ZeroDivisionError), shared.take(1):
        raise ZeroDivisionError
    with shared.take(1):
        pass


@pytest.mark.parametrize("kind", ["aoti-cpu", "ort-cpu"])
@pytest.mark.parametrize("shared", [True, False])
def test_decoders_and_engine_take_turns(
    artifact: Artifact, kind: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without turns they crowd the cores: what is measured can be seen."""
    busy, decode = Busy(), stages_cpu.decode
    monkeypatch.setattr(turns, "_turns", Turns(CORES) if shared else None)

    def decode_counted(encoded: bytes, pre: Preprocess) -> Any:
        with busy.on(1):
            return decode(encoded, pre)

    monkeypatch.setattr(stages_cpu, "decode", decode_counted)
    engine = counted_engine(artifact, kind, busy)
    stages = CpuStages(artifact.spec.preprocess, threads=CORES)
    encoded = [noisy_jpeg(seed) for seed in range(ROWS)]
    pixels_nchw = np.empty((ROWS, *engine.card.row_shape), np.float32)

    def encode() -> None:
        for _ in range(RUNS):
            engine.launch(0, engine.card.batch)
            engine.result(0)

    with ThreadPoolExecutor(1) as encoder:
        encoding = encoder.submit(encode)
        batch = stages(Batch(np.arange(ROWS), encoded), pixels_nchw)
        encoding.result(timeout=60)
    stages.close()
    assert not batch.failed
    assert busy.most == CORES if shared else busy.most > CORES


def counted_engine(artifact: Artifact, kind: str, busy: Busy) -> AotiCpuEngine | OrtCpuEngine:
    path, card = next((path, card) for path, card in artifact.cards() if (card.tower, card.runtime) == ("vision", kind))
    if kind == "ort-cpu":
        ort = OrtCpuEngine(path, card, CORES, 4)
        run = ort._bound.run

        def run_counted(slot: int, options: Any = None) -> None:
            with busy.on(CORES):
                run(slot, options)

        ort._bound.run = run_counted  # type: ignore[method-assign]
        return ort
    aoti = AotiCpuEngine(path, card, CORES, None)
    call = aoti._model.AOTInductorModelContainerRun

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(aoti_model, name)

        def AOTInductorModelContainerRun(self, *args: Any) -> Any:
            with busy.on(1):
                return call(*args)

    aoti_model = aoti._model
    aoti._model = Counted()  # type: ignore[assignment]
    return aoti
