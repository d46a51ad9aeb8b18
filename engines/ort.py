"""ONNX Runtime engines. `ort-cpu` is the fp32 reference on any host, and answers text queries without torch.

The vision engine opens the portable graph of the artifact and stores no copy. The text engine is opened anew for every
query on the command line, so it is stored as ORT holds it after optimisation and mapped, not parsed: 0.3 instead of
0.9 s for B/32 beside other work, same bits. Buffers are allocated once and bound by pointer. `launch` computes before
it returns, without the GIL: the overlap with decoding comes from the lane's threads.

Sessions of every provider are opened and bound here: what runs on a GPU (`ort_gpu`) is tested on the CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from engines import EngineUnavailable
from engines.spec import EngineCard
from engines.turns import turn

CPU_PROVIDER = "CPUExecutionProvider"
RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"


class Buffer(NamedTuple):
    """Contiguous memory that somebody else keeps alive: ONNX Runtime holds a bare pointer."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, array: npt.NDArray[Any]) -> Buffer:
        return cls(array.ctypes.data, array.shape, array.dtype)


class BoundSession:
    """A session with one pair of bound buffers for each slot; `place` is "cpu" or "cuda", where the buffers lie."""

    def __init__(
        self, session: Any, card: EngineCard, place: str, inputs: Sequence[Buffer], outputs: Sequence[Buffer]
    ) -> None:
        self._session, self._bindings = session, []
        for source, target in zip(inputs, outputs, strict=True):
            binding = session.io_binding()
            binding.bind_input(card.input_name, place, 0, source.dtype.type, source.shape, source.pointer)
            binding.bind_output(card.output_name, place, 0, target.dtype.type, target.shape, target.pointer)
            self._bindings.append(binding)

    def run(self, slot: int, options: Any = None) -> None:
        self._session.run_with_iobinding(self._bindings[slot], options)


class OrtCpuEngine:
    """One session, `slots` pairs of bound buffers. Graphs with a dynamic batch take any `batch` at open."""

    slots = 3  # two batches in the encoder's hands, one that is being filled

    def __init__(self, card_path: Path, card: EngineCard, threads: int, batch: int | None) -> None:
        batch = batch or card.batch
        session = open_session(card_path.parent / card.file, CPU_PROVIDER, _cpu_options(threads))
        _expect_batch(session, card, batch)
        self.card = replace(card, batch=batch, threads=threads)
        self._inputs = [np.zeros((batch, *card.row_shape), card.input_dtype) for _ in range(self.slots)]
        self._outputs = [np.zeros((batch, card.dim), np.float32) for _ in range(self.slots)]
        self._rows = [0] * self.slots
        inputs, outputs = map(Buffer.of, self._inputs), map(Buffer.of, self._outputs)
        self._bound = BoundSession(session, card, "cpu", list(inputs), list(outputs))

    def input(self, slot: int) -> npt.NDArray[Any]:
        return self._inputs[slot]

    def launch(self, slot: int, n: int) -> None:
        """Synchronous. Rows from `n` on keep what an earlier batch left there; no row depends on another."""
        self._rows[slot] = n
        with turn(self.card.threads):
            self._bound.run(slot)

    def result(self, slot: int) -> npt.NDArray[np.float16]:
        return self._outputs[slot][: self._rows[slot]].astype(np.float16)

    def result_fp32(self, slot: int) -> npt.NDArray[np.float32]:
        return self._outputs[slot][: self._rows[slot]].copy()


def open_session(
    graph: Path | bytes, provider: str, options: Any = None, provider_options: Mapping[str, str] | None = None
) -> Any:
    """A session that runs every node of `graph` on `provider`, or an error.

    Asking is not enough: ONNX Runtime 1.31's CUDA provider goes on with the CPU when a library is missing, even with
    `enable_fallback=False`. So what each node was given to is read back.

    Raises:
        EngineUnavailable: the provider cannot be had, or did not take all of the graph.
    """
    name = graph.name if isinstance(graph, Path) else "the graph"
    options = options or ort.SessionOptions()
    options.add_session_config_entry(RECORD_ASSIGNMENT, "1")
    if provider not in ort.get_available_providers():
        have = ", ".join(ort.get_available_providers())
        raise EngineUnavailable(f"{provider} is not part of this {package()} {ort.__version__} (it has {have})")
    asked = [(provider, dict(provider_options or {}))]
    session = ort.InferenceSession(graph, options, providers=asked, enable_fallback=False)
    taken: Counter[str] = Counter()
    for group in session.get_provider_graph_assignment_info():
        taken[group.ep_name] += len(group.get_nodes())
    if provider == CPU_PROVIDER and not taken:  # nothing is told of files of `save_optimised`; they know no other
        taken[provider] = len(session.get_providers())
    if session.get_providers()[0] != provider or set(taken) != {provider}:
        raise EngineUnavailable(
            f"{name} was opened on {dict(taken)} (nodes), asked for {provider} alone. ONNX Runtime gave its reason on "
            "standard error; most often a library that the provider needs is missing"
        )
    return session


def package() -> str:
    """The distribution that brings `onnxruntime` here: two bring the same module, and a card names what it was."""
    for name in ("onnxruntime-gpu", "onnxruntime"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return name
    raise EngineUnavailable("onnxruntime was not installed as a package: pip install 'nightjar[cpu]'")


def save_optimised(graph: Path, target: Path) -> None:
    """Write `graph` in the form that opens fastest. It holds for the CPU and the ORT version it was written with."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.log_severity_level = 3  # without the advice that the file is made for this CPU: its card says so
    ort.InferenceSession(graph, options, providers=[CPU_PROVIDER], enable_fallback=False)


def _cpu_options(threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Idle pool threads would otherwise spin after each run, on the cores that decode the next batch.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # For files of `save_optimised`: weights stay where they are mapped.
    options.add_session_config_entry("session.use_memory_mapped_ort_model", "1")
    options.add_session_config_entry("session.use_ort_model_bytes_for_initializers", "1")
    return options


def _expect_batch(session: Any, card: EngineCard, batch: int) -> None:
    rows = {node.name: node.shape for node in session.get_inputs()}[card.input_name][0]
    if isinstance(rows, int) and rows != batch:  # a name stands there where the batch is dynamic
        raise EngineUnavailable(f"{card.file} takes batches of {rows}, asked for {batch}: open it with batch={rows}")
