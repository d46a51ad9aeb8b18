"""ONNX Runtime engines. `ort-cpu` is the fp32 reference on any host, and answers text queries without torch.

The vision engine opens the portable graph of the artifact and stores no copy. The text engine is opened anew for every
query on the command line, so it is stored as ORT holds it after optimisation and mapped, not parsed: 0.3 instead of
0.9 s for B/32 beside other work, same bits. Buffers are allocated once and bound by pointer. `launch` computes before
it returns, without the GIL: the overlap with decoding comes from the lane's threads.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from engines import EngineUnavailable
from engines.spec import EngineCard

CPU_PROVIDER = "CPUExecutionProvider"


class OrtCpuEngine:
    """One session, `slots` pairs of bound buffers. Graphs with a dynamic batch take any `batch` at open."""

    def __init__(self, card_path: Path, card: EngineCard, threads: int, batch: int | None, slots: int = 3) -> None:
        batch = batch or card.batch
        self._session = _open_session(card_path.parent / card.file, threads)
        _expect_batch(self._session, card, batch)
        self.card = replace(card, batch=batch, threads=threads)
        self.slots = slots
        self._inputs = [np.zeros((batch, *card.row_shape), card.input_dtype) for _ in range(slots)]
        self._outputs = [np.zeros((batch, card.dim), np.float32) for _ in range(slots)]
        self._rows = [0] * slots
        self._bindings = [self._bind(slot) for slot in range(slots)]

    def _bind(self, slot: int) -> Any:
        binding, source, target = self._session.io_binding(), self._inputs[slot], self._outputs[slot]
        binding.bind_input(self.card.input_name, "cpu", 0, source.dtype.type, source.shape, source.ctypes.data)
        binding.bind_output(self.card.output_name, "cpu", 0, np.float32, target.shape, target.ctypes.data)
        return binding

    def input(self, slot: int) -> npt.NDArray[Any]:
        return self._inputs[slot]

    def launch(self, slot: int, n: int) -> None:
        """Synchronous. Rows from `n` on keep what an earlier batch left there; no row depends on another."""
        self._rows[slot] = n
        self._session.run_with_iobinding(self._bindings[slot])

    def result(self, slot: int) -> npt.NDArray[np.float16]:
        return self._outputs[slot][: self._rows[slot]].astype(np.float16)

    def result_fp32(self, slot: int) -> npt.NDArray[np.float32]:
        return self._outputs[slot][: self._rows[slot]].copy()


def save_optimised(graph: Path, target: Path) -> None:
    """Write `graph` in the form that opens fastest. It holds for the CPU and the ORT version it was written with."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.log_severity_level = 3  # without the advice that the file is made for this CPU: its card says so
    ort.InferenceSession(graph, options, providers=[CPU_PROVIDER], enable_fallback=False)


def _open_session(graph: Path, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Idle pool threads would otherwise spin after each run, on the cores that decode the next batch.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # For files of `save_optimised`: weights stay where they are mapped.
    options.add_session_config_entry("session.use_memory_mapped_ort_model", "1")
    options.add_session_config_entry("session.use_ort_model_bytes_for_initializers", "1")
    session = ort.InferenceSession(graph, options, providers=[CPU_PROVIDER], enable_fallback=False)
    if session.get_providers() != [CPU_PROVIDER]:
        raise EngineUnavailable(f"{graph.name} was opened on {session.get_providers()}, asked for {CPU_PROVIDER} alone")
    return session


def _expect_batch(session: Any, card: EngineCard, batch: int) -> None:
    rows = {node.name: node.shape for node in session.get_inputs()}[card.input_name][0]
    if isinstance(rows, int) and rows != batch:  # a name stands there where the batch is dynamic
        raise EngineUnavailable(f"{card.file} takes batches of {rows}, asked for {batch}: open it with batch={rows}")
