"""What check_gpu found, as JSON, Markdown and plots: figures against their bars, and what could not run, and why.

    python -m pipeline.gpu_check.report_gpu docs/benchmarks/DATE-GPU  # draws what gpu_check.json there holds

`unmet(rows)` names the figures that were measured and miss their bar.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Rows = Sequence[dict[str, Any]]


class Bar(NamedTuple):
    sign: str  # ">=" or "<"
    value: float
    unit: str

    def met(self, figure: float) -> bool:
        return figure >= self.value if self.sign == ">=" else figure < self.value


# One H200 and 16 cores, 500 x 375 JPEGs from the page cache, unless the name says otherwise.
BARS = {
    "full GPU over OpenCV + ORT CUDA": Bar(">=", 10, "x"),
    "image stage 400": Bar("<", 3, "ms per batch of 32"),
    "image stage 800": Bar("<", 8, "ms per batch of 32"),
    "image stage 1600": Bar("<", 20, "ms per batch of 32"),
    "image stage 400 over OpenCV": Bar(">=", 6, "x"),
    "image stage 800 over OpenCV": Bar(">=", 10, "x"),
    "image stage 1600 over OpenCV": Bar(">=", 12, "x"),
    "B/32 end to end": Bar(">=", 15_000, "img/s"),
    "B/32 end to end over the slower of decode and model": Bar(">=", 0.9, "x"),
    "L/14 end to end": Bar(">=", 2_500, "img/s"),
    "B/32 GPU memory": Bar("<", 4_000, "MiB"),
    "one picture p50": Bar("<", 4, "ms"),
}


def figures(rows: Rows) -> dict[str, float]:
    """Every figure that was measured, and the one that takes two rows."""
    found: dict[str, float] = {}
    for row in rows:
        found |= row["evidence"].get("figures", {})
    alone = [found.get(f"B/32 {stage} alone", 0) for stage in ("decode", "model")]
    if min(alone) > 0 and "B/32 end to end" in found:
        whole = found["B/32 end to end"] / min(alone)
        found["B/32 end to end over the slower of decode and model"] = round(whole, 3)
    return found


def unmet(rows: Rows) -> list[str]:
    return [name for name, value in figures(rows).items() if name in BARS and not BARS[name].met(value)]


def write_report(out: Path, report: dict[str, Any]) -> None:
    """gpu_check.json and gpu_check.md, without plots."""
    out.mkdir(parents=True, exist_ok=True)
    report["figures"] = figures(report["checks"])
    _write(out / "gpu_check.json", json.dumps(report, indent=1) + "\n")
    _write(out / "gpu_check.md", markdown(report, [], "not drawn yet"))


def _write(path: Path, text: str) -> None:
    (draft := path.with_suffix(".tmp")).write_text(text)
    draft.replace(path)  # whoever ends us leaves the last whole one


def main(arguments: Sequence[str]) -> int:
    """Draw the plots of a report that is written, and name them in its Markdown."""
    (out,) = map(Path, arguments)
    report = json.loads((out / "gpu_check.json").read_text())
    _write(out / "gpu_check.md", markdown(report, *draw(report["checks"], out)))
    return 0


def markdown(report: dict[str, Any], plots: Sequence[Path], no_plots: str) -> str:
    rows, measured = report["checks"], figures(report["checks"])
    lines = [f"# GPU check: {report['gpu']['name']}, {report['date']}", "", f"`{report['command']}`", ""]
    lines += [f"- {key}: {value}" for key, value in (report["gpu"] | report["versions"]).items()]
    lines += ["", "One run. Pictures are generated, weights random: speed only, never quality.", ""]
    lines += ["## Figures", "", "| figure | measured | bar | met |", "|---|---|---|---|"]
    for name, bar in BARS.items():
        value = measured.get(name)
        verdict = "not measured" if value is None else "yes" if bar.met(value) else "**no**"
        lines.append(_cells(name, "-" if value is None else value, f"{bar.sign} {bar.value:,} {bar.unit}", verdict))
    lines += [_cells(name, value, "-", "-") for name, value in measured.items() if name not in BARS]
    lines += ["", "## What could not run, or failed", "", "| part | status | why |", "|---|---|---|"]
    lines += [_cells(one["name"], one["status"], one["answer"]) for one in rows if one["status"] != "pass"] or [
        _cells("none", "-", "-")
    ]
    lines += ["", "## All parts", "", "| part | question | status | answer | s |", "|---|---|---|---|---|"]
    lines += [_cells(*(one[key] for key in ("name", "question", "status", "answer", "seconds"))) for one in rows]
    lines.append("\nEvidence for each answer is in gpu_check.json.")
    lines += ["", *(f"![{path.stem}]({path.name})" for path in plots)]
    if no_plots:
        lines.append(f"Plots that are not there: {no_plots}.")
    return "\n".join(lines) + "\n"


def _cells(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def draw(rows: Rows, out: Path) -> tuple[list[Path], str]:
    """The plots that could be drawn, and why others could not. Nothing here may cost the report."""
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError as error:
        return [], f"{error} (pip install 'nightjar[bench]')"
    matplotlib.use("Agg")  # no display
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    measured = {row["name"]: row["evidence"] for row in rows if row["status"] == "pass"}
    plots: dict[str, Callable[[Any, Any], None]] = {
        "image stage": _image_stage,
        "pipelines": _pipelines,
        "replicas": _replicas,
        "decode mixes": _decode_mixes,
    }
    written, reasons = [], [f"{name} was not measured" for name in plots if name not in measured]
    for name, plot in plots.items():
        if name not in measured:
            continue
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        try:
            plot(axes, measured[name])
            figure.savefig(path := out / f"{name.replace(' ', '_')}.png", dpi=100)
            written.append(path)
        except Exception as error:  # noqa: BLE001  whatever the library does not like
            reasons.append(f"{name}: {type(error).__name__}: {error}")
        pyplot.close(figure)
    return written, "; ".join(reasons)


def _image_stage(axes: Any, evidence: Any) -> None:
    published = {"400": (34.7, 9.1), "800": (176.7, 34.6), "1600": (430.2, 69.0)}
    for number, (name, ms) in enumerate(evidence["ms"].items()):
        for offset, who in ((-0.2, "opencv"), (0.2, "gpu")):
            colours = ("#9ecae1", "#3182bd") if who == "opencv" else ("#a1d99b", "#31a354")
            label = [f"{who}, {part}" if not number else None for part in ("decode", "preprocess")]
            axes.bar(number + offset, ms[who]["decode"], 0.36, color=colours[1], label=label[0])
            axes.bar(
                number + offset, ms[who]["preprocess"], 0.36, bottom=ms[who]["decode"], color=colours[0], label=label[1]
            )
            mark = published[name][0 if who == "opencv" else 1]
            axes.plot(number + offset, mark, "k_", ms=16, label=None if number or who == "gpu" else "published by Bing")
    axes.set_xticks(range(len(evidence["ms"])), [f"{name} x {name}" for name in evidence["ms"]])
    axes.set(yscale="log", ylabel="ms per batch of 32", title="Image stage: OpenCV on one thread, and ours")
    axes.legend()


def _pipelines(axes: Any, evidence: Any) -> None:
    names, rates = list(evidence["rates"]), list(evidence["rates"].values())
    axes.bar_label(axes.barh(names, rates), fmt="{:,.0f}", padding=3)
    axes.set(xlabel="images/s", title=f"Pipelines, B/32, batch {evidence['batch']}")
    axes.invert_yaxis()


def _replicas(axes: Any, evidence: Any) -> None:
    names = [name.removeprefix("B/32 replicas ") for name in evidence["figures"]]
    axes.bar_label(axes.bar(names, list(evidence["figures"].values())), fmt="{:,.0f}")
    axes.set(xlabel="engines on one GPU", ylabel="images/s together", title="B/32, model alone")


def _decode_mixes(axes: Any, evidence: Any) -> None:
    axes.bar_label(axes.bar(list(evidence["rates"]), list(evidence["rates"].values())), fmt="{:,.0f}")
    axes.tick_params(axis="x", labelrotation=30)
    axes.set(ylabel="images/s", title="JPEG decode, 500 x 375, by share of the hardware engine")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
