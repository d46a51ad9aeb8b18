"""`make engines`: export the model, compile every engine this host can run, prove each right, measure it, keep it.

    python -m engines.build --model openai/clip-vit-base-patch32
    python -m engines.build --model ./my-clip --runtime ort-cpu
    python -m engines.build --precision bf16 --json
    python -m engines.build --runtime tensorrt-rtx --target sm89     # for a GPU that is not here

`ort-cpu` is always built: it is the reference, and it answers text queries. `aoti-cpu` is built where there is a C++
compiler: 80 s for B/32 on 2 cores, 1.2 to 1.3 times as fast in fp32. Engines of one run are timed in turns, with the
GEMM peak between them, because on a shared machine only such ratios mean something. A second run over unchanged input
compares digests and returns within seconds without loading torch. On a host with a GPU its engines are built and gated
too (`build_gpu`).
Exit codes: 0 done, 1 an engine missed its accuracy bar or nothing could be written, 2 usage or configuration.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import cast

from engines import (
    GPU_RUNTIMES,
    RUNTIMES,
    EngineUnavailable,
    build_gpu,
    choose,
    device_of,
    file_digest,
    gate,
    load_engine,
    ort,
    refusal,
    stale,
)
from engines.hardware import host_id, physical_cores
from engines.memory_gpu import OutOfGpuMemory
from engines.plan import COMPILED, PrecisionWish, Want, plan, write_whole
from engines.rates import measure_rates
from engines.spec import Artifact, EngineCard, artifacts_root, default_model, workplace

log = logging.getLogger(__name__)

RECIPE = 4  # raise it when the same graph would be built differently: engines of another recipe are built again


@dataclass
class Draft:
    """An engine that is compiled and open, but not finished: no card lies beside it yet."""

    folder: Path
    card: EngineCard
    engine: gate.ExactEngine | None  # None: for a GPU that is not here


@dataclass
class Report:
    artifact: Artifact
    cards: list[EngineCard]  # of the engines this call was asked for, built now or found current
    built: int
    notes: list[str]  # what was chosen, and why
    failures: list[gate.GateFailed]


def build_engines(
    model: str,
    runtime: str = "auto",
    precision: PrecisionWish = "auto",
    *,
    allow_inaccurate: bool = False,
    root: Path | None = None,
    target: str | None = None,
) -> Report:
    """Export `model` and build what is missing or stale of its engines for this host.

    Engines that pass are kept even when another one fails: `Report.failures` then holds the measured numbers.
    `target` is the SM of a GPU that is not here, such as "sm89".

    Raises:
        EngineUnavailable: what was named cannot be built here.
        export.source.ExportError: the model cannot be had or reproduced.
    """
    from export.to_onnx import export_artifact

    artifact = export_artifact(model, root or artifacts_root())
    wanted, notes = plan(artifact, runtime, precision)
    if target is not None or runtime in ("auto", *GPU_RUNTIMES):
        wanted_gpu, notes_gpu = build_gpu.plan_gpu(artifact, runtime, precision, RECIPE, target)
        wanted, notes = [*wanted, *wanted_gpu], [*notes, *notes_gpu]

    def missing() -> list[Want]:
        return [want for want in wanted if not _is_current(artifact, want, allow_inaccurate)]

    drafts: list[Draft] = []
    failures: list[gate.GateFailed] = []
    if missing():
        # Not in engines/: a card names its graph as ../../onnx/, which must hold before and after the move.
        with workplace(artifact.path) as scratch:
            for want in missing():  # asked again: another process may have built them while this one waited
                log.info("building %s %s %s", want.tower, want.runtime, want.precision)
                try:
                    draft = _draft(artifact, want, scratch / want.folder)
                    parity = draft.engine and gate.measure(draft.engine, *gate.golden(artifact, want.tower))
                except (EngineUnavailable, OutOfGpuMemory) as error:
                    if runtime != "auto":
                        raise
                    notes.append(f"{error}. Going on without it")
                    continue
                if parity:
                    draft.card = replace(draft.card, parity=parity.as_numbers(), passed=not parity.failures)
                if parity and parity.failures and not allow_inaccurate:
                    failures.append(gate.GateFailed(f"{want.tower} {want.runtime} {want.precision}", parity))
                else:
                    drafts.append(draft)
            _measure(artifact, [draft for draft in drafts if draft.engine])
            for draft in drafts:
                _finish(artifact, draft)
    cards = [card for want in wanted if (card := _read_card(artifact, want))]
    return Report(artifact, cards, len(drafts), [*notes, *_auto_notes(artifact)], failures)


def _measure(artifact: Artifact, drafts: list[Draft]) -> None:
    rates = measure_rates(artifact, [cast(gate.ExactEngine, draft.engine) for draft in drafts])
    for draft, (rate, gflop_per_s, share) in zip(drafts, rates, strict=True):
        draft.card = replace(draft.card, rows_per_s=rate, gflop_per_s=gflop_per_s, peak_share=share)


def _auto_notes(artifact: Artifact) -> list[str]:
    notes = []
    for tower in ("vision", "text"):
        try:
            notes.append(f"auto takes for {tower}: {choose(artifact, tower).reason}")
        except EngineUnavailable as error:
            notes.append(f"auto has nothing for {tower}: {error}")
    return notes


def _draft(artifact: Artifact, want: Want, folder: Path) -> Draft:
    folder.mkdir()
    if device_of(want.runtime) == "gpu":
        card = build_gpu.compile_gpu(artifact, want, folder, RECIPE)
        return Draft(folder, card, _open(folder, card) if card.verified else None)
    graph = artifact.onnx(want.tower, want.precision)
    if want.runtime == COMPILED:
        file, package = "engine.so", "torch"
        _compile(artifact, want, folder / file)
    elif want.tower == "text":
        file, package = "engine.ort", ort.package()
        ort.save_optimised(graph, folder / file)
    else:
        file, package = f"../../onnx/{graph.name}", ort.package()
    path = folder / file
    inputs, vectors = gate.golden(artifact, want.tower)
    card = EngineCard(
        tower=want.tower,
        runtime=want.runtime,
        precision=want.precision,
        host=host_id(),
        weights_digest=artifact.spec.weights_digest,
        file=file,
        file_digest=file_digest(path),
        batch=want.batch,
        compiled_rows=want.batch if want.runtime == COMPILED else 0,
        threads=physical_cores(),
        input_name="pixels" if want.tower == "vision" else "ids",
        input_dtype=inputs.dtype.name,
        row_shape=inputs.shape[1:],
        output_name="vectors",
        dim=vectors.shape[1],
        versions={package: metadata.version(package)},
        parity={},
        passed=False,
        rows_per_s=0.0,
        gflop_per_s=0.0,
        peak_share=0.0,
        bytes=path.stat().st_size,
        recipe=RECIPE,
    )
    engine = _open(folder, card)
    return Draft(folder, engine.card, engine)


def _open(folder: Path, card: EngineCard) -> gate.ExactEngine:
    return cast(gate.ExactEngine, load_engine(folder / "card.json", card, card.threads))


def _compile(artifact: Artifact, want: Want, library: Path) -> None:
    import numpy as np

    from export.to_aoti import compile_tower
    from export.towers import load_towers

    towers = load_towers(artifact.spec.model)
    if towers.spec.weights_digest != artifact.spec.weights_digest:
        raise EngineUnavailable(f"{artifact.spec.model} changed while it was being built; run the same command again")
    golden_rows, _ = gate.golden(artifact, want.tower)
    example = np.resize(golden_rows, (want.batch, *golden_rows.shape[1:]))
    compile_tower(getattr(towers, want.tower), example, want.precision, library)


def _finish(artifact: Artifact, draft: Draft) -> None:
    """Move a draft to its place, its card last: where a card lies, the engine is whole."""
    if device_of(draft.card.runtime) == "gpu":
        for folder in build_gpu.superseded(artifact, draft.card, artifact.path / "engines" / draft.folder.name):
            (folder / "card.json").unlink()
            shutil.rmtree(folder)
    final = artifact.path / "engines" / draft.folder.name
    (final / "card.json").unlink(missing_ok=True)
    shutil.rmtree(final, ignore_errors=True)
    final.parent.mkdir(exist_ok=True)
    os.replace(draft.folder, final)
    write_whole(final / "card.json", draft.card.to_json())


def _read_card(artifact: Artifact, want: Want) -> EngineCard | None:
    path = artifact.path / "engines" / want.folder / "card.json"
    return EngineCard.from_json(path.read_text()) if path.is_file() else None


def _is_current(artifact: Artifact, want: Want, allow_inaccurate: bool) -> bool:
    card = _read_card(artifact, want)
    if card is None or card.recipe != RECIPE:
        return False
    path = artifact.path / "engines" / want.folder / "card.json"
    if not card.verified:
        return not stale(artifact, path, card)
    return not refusal(artifact, path, card) and (card.passed or allow_inaccurate)


def print_report(report: Report, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report.artifact.spec.model} -> {report.artifact.path}", title_justify="left")
    for name in ("tower", "runtime", "precision"):
        table.add_column(name)
    for name in ("batch", "threads", "rows/s", "GFLOP/s", "of peak", "error/spread", "allowed", "MB", "kernels (mha)"):
        table.add_column(name, justify="right")
    for card in report.cards:
        table.add_row(
            card.tower, card.runtime, card.precision, str(card.batch), str(card.threads or "-"), *_measured(card),
            f"{card.bytes / 1e6:.1f}", f"{card.kernels} ({card.fused_attention})" if card.kernels else "-",
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    kept = len(report.cards) - report.built
    console.print(
        f"nothing changed: {kept} engines are current ({seconds:.1f} s)"
        if not report.built and not report.failures
        else f"built {report.built}, kept {kept} ({seconds:.1f} s)"
    )
    for note in report.notes:
        console.print(note, highlight=False, soft_wrap=True)


def _measured(card: EngineCard) -> tuple[str, str, str, str, str]:
    if not card.verified:
        return "-", "-", "-", "unverified", "-"
    error = f"{card.parity['error_over_spread']:.1e}" + ("" if card.passed else " MISSED")
    speed = f"{card.rows_per_s:.1f}", f"{card.gflop_per_s:.1f}", f"{card.peak_share:.0%}"
    return *speed, error, f"{card.parity['error_allowed']}"


def main(arguments: list[str] | None = None) -> int:
    examples = __doc__.split("\n\n")[1] if __doc__ else ""
    parser = argparse.ArgumentParser(
        prog="python -m engines.build", description="Export a model and build its engines for this host.",
        epilog=f"examples:\n{examples}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", default=default_model(), help="hub id or directory (default: %(default)s)")
    parser.add_argument("--runtime", default="auto", choices=["auto", *RUNTIMES], help="default: %(default)s")
    parser.add_argument(
        "--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16", "int8"],
        help="of compiled engines (default: measured on a CPU, fp16 on a GPU; int8 only where it is named)",
    )  # fmt: skip
    parser.add_argument("--target", help="build for a GPU that is not here, with --runtime tensorrt-rtx; such as sm89")
    parser.add_argument("--allow-inaccurate", action="store_true", help="keep engines that miss their accuracy bar")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)

    from export.source import ExportError

    start = time.perf_counter()
    try:
        report = build_engines(
            asked.model, asked.runtime, asked.precision, allow_inaccurate=asked.allow_inaccurate, target=asked.target
        )
    except (EngineUnavailable, ExportError, OutOfGpuMemory) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}. What was finished before it is kept; the same command goes on", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - start
    if asked.json:
        cards = [asdict(card) for card in report.cards]
        found = {"artifact": str(report.artifact.path), "built": report.built, "seconds": seconds, "engines": cards}
        print(json.dumps({**found, "notes": report.notes, "failures": [str(error) for error in report.failures]}))
    else:
        print_report(report, seconds)
    for failure in report.failures:
        print(f"error: {failure}. Nothing was kept of it; --allow-inaccurate keeps it, marked", file=sys.stderr)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
