"""Health of a container: can it work? Exit 0, or 1 with the reason in one line.

    python health.py [--gpu] [--index DIR]

The index folder takes a file, an artifact is there once engines were built, and with `--gpu` a GPU answers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from engines.memory_gpu import gpu_problem
from engines.spec import artifacts_root


def problem(index: Path, *, gpu: bool) -> str:
    """Why no run could work here now; empty where one could."""
    try:
        with tempfile.NamedTemporaryFile(dir=index, prefix=".health-"):
            pass
    except OSError as error:
        return f"the index folder takes no file: {error}"
    if not any(artifacts_root().glob("*/spec.json")):
        return f"no artifact in {artifacts_root()}: run engines.build first"
    return gpu_problem() if gpu else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="a GPU must answer too")
    parser.add_argument("--index", type=Path, default=Path("/index"), help="default: %(default)s")
    args = parser.parse_args()
    words = problem(args.index, gpu=args.gpu)
    if words:
        print(words, file=sys.stderr)
    return 1 if words else 0


if __name__ == "__main__":
    sys.exit(main())
