"""Result files beside the JSON of `pipeline.bench`: CSV, Markdown, and plots like figures 4 to 10 of the study.

Its values stand beside ours, as images/s on its own hardware. Plots need matplotlib (`pip install 'nightjar[bench]'`);
without it the Markdown says so.
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.bench import published
from pipeline.bench.published import STUDY_IMAGES

Rows = list[dict[str, Any]]
LADDER_COLUMNS = (
    "rung", "change", "figure", "precision", "device", "images", "rounds", "images_per_s", "images_per_s_min",
    "images_per_s_max", "start_s", "preprocess_ms", "transfer_ms", "forward_ms", "peak_rss_mb", "gflop_per_s",
    "peak_share",
    "joules_per_image", "lost", "scored_twice", "error_over_spread", "top9_overlap", "verdict",
)  # fmt: skip

HEAD = frozenset(  # told in words of their own, or of no use to a reader
    ("command", "date", "host", "cpu", "cores", "load_before", "energy", "python", "note", "seconds")
)
LADDER_NOTE = (
    "images_per_s counts from loaded models to the last vector, start_s is the rest of the run. Stages overlap where "
    "they can and share the cores, so their times do not add up. GFLOP/s are those that a vector needs, the same for "
    "all rungs, and peak_share is of a square matrix product of that precision, measured before and after each rung."
)


def write(part: str, result: dict[str, Any], out: Path) -> list[Path]:
    """Files of one part, and their paths."""
    text = [f"# {part}: {result['cpu']}, {result['cores']} cores, {result['date']}", "", f"`{result['command']}`", ""]
    text += [f"Took {result['seconds']:g} s; load before: {result['load_before']}; energy: {result['energy']}.", ""]
    text += [", ".join(f"{name} {number}" for name, number in result["versions"].items()), ""]
    if note := result.get("note"):
        text += [f"Not all of it: {note}.", ""]
    text += [f"{line}\n" for line in plain(result)]
    written: list[Path] = []
    if part == "ladder":
        rows = [flat(row) for row in result["rungs"]]
        text += [LADDER_NOTE, "", *table(LADDER_COLUMNS, rows), "", *study_table(), ""]
        written = [_csv(out / "ladder.csv", LADDER_COLUMNS, rows), *draw(result["rungs"], out, text)]
    else:
        for name, rows in tables(result):
            columns = list(dict.fromkeys(key for row in rows for key in row))
            text += [f"## {name.replace('_', ' ')}", "", *table(columns, rows), ""]
            written.append(_csv(out / f"{part}-{name}.csv".replace(" ", "-"), columns, rows))
    (target := out / f"{part}.md").write_text("\n".join(text).rstrip() + "\n")
    return [target, *written]


def tables(result: dict[str, Any]) -> Iterator[tuple[str, Rows]]:
    """Lists of rows become tables, and what is a plain name -> number one of two columns."""
    for name, value in result.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield name, value
        elif (
            isinstance(value, dict)
            and name != "versions"
            and all(isinstance(one, int | float) for one in value.values())
        ):
            yield name, [{"what": key, "value": one} for key, one in value.items()]


def plain(result: dict[str, Any]) -> Iterator[str]:
    """What a part says of itself beside its tables, such as the model and the pictures."""
    for name, value in result.items():
        if name not in HEAD and isinstance(value, str | int | float):
            yield f"{name.replace('_', ' ')}: {value}"


def failed(result: dict[str, Any]) -> list[str]:
    """Rungs that lost images or changed answers. What could not run here is no failure, what died is."""
    return [
        row["rung"] for row in result.get("rungs", []) if row.get("failures") or row["skipped"].startswith("failed")
    ]


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A rung as one line of a table."""
    stages = {f"{name}_ms": value for name, value in row.get("stages_ms_per_image", {}).items()}
    verdict = row["skipped"] or "; ".join(row.get("failures", [])) or "ok"
    return {**row, **stages, "verdict": verdict}


def table(columns: Sequence[str], rows: Rows) -> list[str]:
    lines = [_cells(columns), _cells(["---"] * len(columns))]
    return lines + [_cells([_number(row.get(column)) for column in columns]) for row in rows]


def study_table() -> list[str]:
    """The published ladder, in images/s."""
    lines = [
        f"Published ({STUDY_IMAGES:,} pictures, ViT-B/32), images/s:",
        "",
        "| hardware | one by one | best | times |",
        "|---|---|---|---|",
    ]
    for name, (first_s, best_s) in published.WHOLE_S.items():
        lines.append(_cells([name, *(f"{STUDY_IMAGES / s:.1f}" for s in (first_s, best_s)), f"{first_s / best_s:.2f}"]))
    return lines


def _cells(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _number(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _csv(path: Path, columns: Sequence[str], rows: Rows) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


# ---- plots -------------------------------------------------------------------------------------------------------


def draw(rungs: Rows, out: Path, text: list[str]) -> list[Path]:
    """figure-4.png to figure-10.png, where there is something for it; appends to `text` what is there and what not."""
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError as error:
        text.append(f"No plots: {error} (pip install 'nightjar[bench]').")
        return []
    matplotlib.use("Agg")  # no display
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    plots: dict[str, Callable[[Any, Rows], bool]] = {
        "4": _threads, "5": _one_by_one, "6": _batches, "7": _producers, "8": _sharing, "9": _replicas, "10": _whole,
    }  # fmt: skip
    written = []
    for number, plot in plots.items():
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        if plot(axes, [row for row in rungs if row["rounds"]]):
            axes.legend()
            figure.savefig(path := out / f"figure-{number}.png", dpi=100)
            written.append(path)
            text += [f"![figure {number}]({path.name})", ""]
        else:
            text += [f"Figure {number} is missing: none of its rungs was measured.", ""]
        pyplot.close(figure)
    return written


def _hf(rows: Rows, figures: str) -> Rows:
    return [row for row in rows if row["rung"].startswith("hf") and row["figure"] in figures]


def _threads(axes: Any, rows: Rows) -> bool:
    ours = _hf(rows, "4")
    for stage, by_threads in published.STAGES_BY_THREADS_S.items():
        first = by_threads[1]
        axes.plot(list(by_threads), [s / first for s in by_threads.values()], "--", label=f"{stage}, published")
        points = sorted((row["config"]["threads"], row["stages_ms_per_image"][stage]) for row in ours)
        if points:
            axes.plot([at for at, _ in points], [ms / points[0][1] for _, ms in points], "o-", label=f"{stage}, here")
    axes.set(xscale="log", xlabel="OpenMP threads", ylabel="time, one thread = 1", title="Stages by threads (figure 4)")
    return bool(ours)


def _one_by_one(axes: Any, rows: Rows) -> bool:
    ours = _hf(rows, "5")
    for row in ours:
        axes.bar_label(axes.bar(f"{row['rung']}, here", row["images_per_s"], color="C0"), fmt="{:.1f}")
    for name, seconds in published.ONE_BY_ONE_S.items():
        axes.bar_label(axes.bar(name, STUDY_IMAGES / seconds, color="0.7"), fmt="{:.1f}")
    axes.plot([], label="grey: published")
    axes.set(ylabel="images/s", title="One picture at a time (figure 5)")
    return bool(ours)


def _batches(axes: Any, rows: Rows) -> bool:
    sweeps = _by_device(_hf(rows, "56"), lambda config: config["batch"])
    for device, ours in sweeps.items():
        axes.plot(list(ours), list(ours.values()), "o-", label=f"{device}, here")
    for name, by_batch in published.BY_BATCH_S.items():
        axes.plot(list(by_batch), [STUDY_IMAGES / s for s in by_batch.values()], "--", label=f"{name}, published")
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="images/s", title="By batch (figure 6)")
    return bool(sweeps)


def _by_device(rows: Rows, at: Callable[[dict[str, Any]], int]) -> dict[str, dict[int, float]]:
    """images/s by device and by what `at` reads from a configuration."""
    found: dict[str, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: at(row["config"])):
        found.setdefault(row["device"], {})[at(row["config"])] = row["images_per_s"]
    return found


def _producers(axes: Any, rows: Rows) -> bool:
    batched = [row for row in rows if row["rung"].startswith("hf batches of 32") and row["device"] == "cpu"]
    grid = [row for row in rows if row["figure"] == "7" and row["config"].get("producers")]
    if not batched or not grid:
        return False
    for row in grid:
        gain = row["images_per_s"] / batched[0]["images_per_s"]
        axes.bar_label(
            axes.bar(f"{row['config']['producers']} x {row['config']['threads']}", gain, color="C0"), fmt="{:.2f}"
        )
    for name, (before_s, after_s) in published.PRODUCERS_S.items():
        label = name.replace(", ", "\n").replace(" CPU", "\nCPU").replace(" x ", "\nx ")
        axes.bar_label(axes.bar(label, before_s / after_s, color="0.7"), fmt="{:.2f}")
    axes.plot([], label="producers x threads, here; grey: published")
    axes.tick_params(axis="x", labelsize=8)
    axes.set(ylabel="times batched", title="Parallel preprocessing (figure 7)")
    return True


def _sharing(axes: Any, rows: Rows) -> bool:
    ours = [row for row in rows if row["figure"] == "8"]
    for row in ours:
        axes.bar_label(axes.bar(f"{row['rung']}, here", row["images_per_s"], color="C0"), fmt="{:.1f}")
    for name, seconds in published.SHARING_S.items():
        axes.bar_label(axes.bar(f"{name}, published", STUDY_IMAGES / seconds, color="0.7"), fmt="{:.1f}")
    here = "" if ours else ", nothing of it measured here"
    axes.set(ylabel="images/s", title=f"CPU and GPU together (figure 8){here}")
    axes.plot([], label="grey: published")
    return True


def _replicas(axes: Any, rows: Rows) -> bool:
    curves = _by_device(_hf(rows, "9"), lambda config: len(config["devices"]))
    for device, ours in curves.items():
        first = next(iter(ours.values()))
        axes.plot(list(ours), [rate / first for rate in ours.values()], "o-", label=f"{device}, here")
    for name, by_count in published.BY_REPLICAS_S.items():
        axes.plot(list(by_count), [by_count[1] / s for s in by_count.values()], "--", label=f"{name}, published")
    axes.set(xlabel="models", ylabel="times the fewest", title="Replicas (figure 9)")
    return bool(curves)


def _whole(axes: Any, rows: Rows) -> bool:
    core = [row for row in rows if row["core"]]
    if not core:
        return False
    first = core[0]["images_per_s"]
    for row in core:
        colour = "C3" if row["failures"] else "C0" if row["rung"].startswith("hf") else "C2"
        axes.bar_label(axes.barh(row["rung"], row["images_per_s"] / first, color=colour), fmt="{:.2f}", padding=3)
    for name, (first_s, best_s) in published.WHOLE_S.items():
        axes.bar_label(axes.barh(f"{name}, published best", first_s / best_s, color="0.7"), fmt="{:.2f}", padding=3)
    axes.plot([], label="green: ours; red: failed; grey: published")
    axes.set(xlabel="times the first rung", title="The whole ladder (figure 10)")
    axes.margins(x=0.1)
    axes.invert_yaxis()
    return True
