"""What a night did, for Prometheus: a text file for node_exporter's textfile collector, written in one step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile
from prometheus_client.parser import text_string_to_metric_families

from pipeline.exits import BUDGET_SPENT, DONE

PREFIX = "nightjar"
SUCCESS = f"{PREFIX}_last_success_timestamp_seconds"
STATES = ("unchanged", "embedded", "copied", "quarantined", "pending")  # of every picture after the run; they add up


def write_metrics(path: Path, night: Mapping[str, Any]) -> None:
    """Write the metrics of `night`, the JSON of its last line. The time of the last success outlives nights that fail.

    Raises:
        OSError: the folder is not there or not writable. ValueError: what is there now is no metrics file.
    """
    registry, index = CollectorRegistry(), str(night["index"])

    def gauge(name: str, words: str, labels: Mapping[str, str], value: float) -> None:
        names = ("index", *labels)
        known = known_gauges.get(name) or Gauge(f"{PREFIX}_{name}", words, names, registry=registry)
        known_gauges[name] = known
        known.labels(index, *labels.values()).set(value)

    known_gauges: dict[str, Gauge] = {}
    now_s = time.time()
    gauge("last_run_timestamp_seconds", "When the last night ended", {}, now_s)
    success_s = now_s if night["exit"] in (DONE, BUDGET_SPENT) else last_success_s(path, index)
    if success_s is not None:
        gauge(
            "last_success_timestamp_seconds", "When the last night ended that published what it should", {}, success_s
        )
    gauge("exit_code", "Exit code of the last night", {}, night["exit"])
    gauge("run_seconds", "Seconds that the last night took", {}, night["seconds"])
    for phase, seconds in night["phases_s"].items():
        gauge("phase_seconds", "Seconds of each phase of the last night", {"phase": phase}, seconds)
    if night["generation"] is not None:
        gauge("generation", "Generation that the last night published", {}, night["generation"])
    for source in night["sources"]:
        name = {"source": source["source"]}
        gauge("source_exit_code", "What the exit code would be, had the night this source alone", name, source["exit"])
        for state in STATES if "inputs" in source else ():
            gauge("pictures", "Pictures by what became of them", {**name, "state": state}, source[state])
            gauge(
                "quarantined_new",
                "Pictures that could not be taken in for the first time",
                name,
                source["quarantined_new"],
            )
            gauge("unlisted", "Folders and containers that could not be listed", name, source["unlisted"]["count"])
            gauge("deleted", "Pictures that are gone from the source", name, source["deleted"])
    write_to_textfile(str(path), registry)


def last_success_s(path: Path, index: str) -> float | None:
    """As the file of an earlier night says."""
    if not path.exists():
        return None
    for family in text_string_to_metric_families(path.read_text(encoding="utf-8")):
        for sample in family.samples:
            if sample.name == SUCCESS and sample.labels.get("index") == index:
                return sample.value
    return None
