"""On the path of a process and its lanes, this gives them GPUs that are none: see fake_runtime for what may be ordered.

Real: everything of ours, and nvImageCodec in its CPU-only mode. Not real: the CUDA runtime, CV-CUDA, and the engine,
which is ONNX Runtime on the CPU behind the slots, copies and events of `engines.engine_gpu`.
"""

import sys
import time
from dataclasses import replace
from typing import Any

import fake_runtime
import numpy as np

sys.modules["cuda.bindings.runtime"] = fake_runtime

import cvcuda  # noqa: E402

from engines import Choice, choose  # noqa: E402
from pipeline import devices  # noqa: E402
from pipeline.lanes import LaneSpec  # noqa: E402

SPEED_UP, BATCH = 20, 8
open_lane_engine, open_stages = devices.open_lane_engine, devices.open_stages


def choose_fake(artifact: Any, tower: Any, runtime: str, precision: Any, device: str = "cpu") -> Choice:
    found = choose(artifact, tower, runtime, precision, "cpu")
    if device == "gpu":
        faster = replace(found.card, rows_per_s=SPEED_UP * found.card.rows_per_s, batch=BATCH)
        found = found._replace(card=faster)
    return found


def open_fake_engine(spec: LaneSpec) -> Any:
    for device in fake_runtime.ORDERS.get("after", {}).get(spec.device, ()):
        while not fake_runtime.started(device).exists():
            time.sleep(0.02)
    if spec.kind == "cpu":
        return open_lane_engine(spec)
    from engines.engine_gpu import GpuEngine
    from engines.spec import Artifact

    path, card, _ = choose(Artifact.open(spec.artifact_path), "vision", "ort-cpu", "auto", "cpu")

    class FakeEngine(GpuEngine):
        def __init__(self) -> None:
            from engines.ort import OrtCpuEngine

            super().__init__(replace(card, runtime="fake"), spec.batch or BATCH)
            self.inside = OrtCpuEngine(path, card, 1, self.card.batch)

        def _enqueue(self, slot: int) -> None:
            fake_runtime.batch_done()
            time.sleep(fake_runtime.ORDERS.get("slow", 0))
            np.copyto(self.inside.input(slot), cvcuda.as_tensor(self._inputs[slot], "NCHW"))
            self.inside.launch(slot, self.card.batch)
            cvcuda.as_tensor(self._outputs[slot], "NC")[:] = self.inside.result_fp32(slot)

    return FakeEngine()


def open_fake_stages(spec: LaneSpec, board: Any, engine: Any) -> Any:
    if spec.kind == "gpu":
        patch_stages()
    try:
        return open_stages(spec, board, engine)
    finally:
        if "after" in fake_runtime.ORDERS:
            fake_runtime.started(spec.device).touch()


def patch_stages() -> None:
    from pipeline import decode_gpu, lane_process, stages_gpu

    lane_process.GPU_DEADLINE_S = 4.0

    class FakeCodec(decode_gpu.Codec):
        def __init__(self, threads: int, stream: int | None, hardware_share: float) -> None:
            super().__init__(threads, None, hardware_share)

        def decode(self, encoded: Any) -> list[Any]:
            if any(picture.endswith(b"GPU-KILL") for picture in encoded):
                fake_runtime.fault()
            if any(picture.endswith(b"GPU-HANG") for picture in encoded):
                time.sleep(3600)
            images = super().decode(encoded)
            if (room := fake_runtime.ORDERS.get("room")) is not None:
                images[room:] = [None] * len(images[room:])
            if fake_runtime.mine() in fake_runtime.ORDERS.get("wrong", ()):
                images = [self.upload(np.zeros((image.height, image.width, 3), np.uint8)) for image in images]
            return images

    class Held:
        def __init__(self, image: Any) -> None:
            self.image, self.shape = image, image.shape

    stages_gpu.Codec, stages_gpu.OnStream = FakeCodec, Held  # type: ignore[misc, assignment]


devices.choose, devices.open_lane_engine, devices.open_stages = choose_fake, open_fake_engine, open_fake_stages
devices.GPU_LIBRARIES.clear()
