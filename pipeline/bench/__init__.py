"""The figures of docs/benchmarks: `python -m pipeline.bench --help`. Named here is what other measurements share."""

from pipeline.bench.pictures import unique_copies
from pipeline.bench.processes import index_command, last_json

__all__ = ["index_command", "last_json", "unique_copies"]
