"""`python -m pipeline.bench`: the figures of docs/benchmarks, each a JSON file with command, hardware and versions.

    ladder    from Hugging Face one by one to our int8 engine, one change each: speed, memory, energy and answers
    peers     our index against what else there is, on clean and on dirty pictures
    text      sequences/s of text towers by batch
    encoders  pictures and texts prepared and encoded, a second, by model, device and runtime
    roofline  what this machine can do at best, measured in the same run, and the share each stage reaches
    startup   what a run pays once: imports, engine, first batch, tail, commits, publish; for nothing to do
    null      what the pipeline itself costs an image, by number of images: an engine and a decoder that do nothing
    race      end to end, rounds in turns, against fastembed, Hugging Face and our own engines alone
    tune      what pipeline.tune found for this CPU, against eleven other settings
    memory    peak RSS of lane and coordinator by number of pictures
    store     rows/s through listing, shard and commit, and what each of them takes
    size      bytes, milliseconds and recall of smaller vectors: one byte, one bit, fewer dimensions; with re-rank

Machines are noisy: only ratios within one run mean anything. Parts that have a limit end there by themselves, with what
they have.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from engines.hardware import cpu_info, host_id
from engines.spec import ArtifactMissing
from pipeline.bench import encoders, figures, memory, null_engine, peers, race, roofline, settings, size, startup, store
from pipeline.bench.energy import read_energy
from pipeline.bench.ladder import ladder
from pipeline.bench.processes import Limit
from pipeline.exits import DONE, USAGE

PACKAGES = ("torch", "onnxruntime", "transformers", "simplejpeg", "pillow", "h5py", "numpy")
NEEDS = {  # beside --out
    "ladder": ("pictures", "model"), "peers": ("pictures", "model"), "race": ("pictures", "model"),
    "memory": ("pictures", "model"), "text": ("model",), "encoders": ("pictures", "model"),
    "roofline": ("pictures", "model"), "startup": ("pictures", "model"), "null": ("model",), "store": (),
    "size": ("index",), "tune": ("pictures", "model"),
}  # fmt: skip
LIMITS_S = {
    "ladder": 720.0,
    "peers": 900.0,
    "text": 150.0,
    "encoders": 180.0,
    "roofline": 90.0,
    "startup": 90.0,
    "null": 90.0,
    "size": 120.0,
    "tune": 900.0,
}


def parser() -> argparse.ArgumentParser:
    parsed = argparse.ArgumentParser(
        prog="python -m pipeline.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parsed.add_argument("what", choices=list(NEEDS))
    parsed.add_argument("--pictures", type=Path, help="folder of JPEG photos")
    parsed.add_argument(
        "--model", nargs="+", metavar="DIR", help="model folder whose engines are built; encoders: several, if you like"
    )
    parsed.add_argument(
        "--answers-model", default="export/demo", help="ladder: whose answers are compared (default: %(default)s)"
    )
    parsed.add_argument(
        "--images",
        type=int,
        nargs="+",
        help="ladder, peers, race: for a contestant of 15 images/s; memory, null: every count",
    )
    parsed.add_argument("--index", type=Path, metavar="DIR", help="size: whose vectors are made smaller")
    parsed.add_argument("--rounds", type=int, default=3)
    defaults = ", ".join(f"{what} {seconds:.0f}" for what, seconds in LIMITS_S.items())
    parsed.add_argument("--limit", type=float, metavar="SECONDS", help=f"end with what there is (default: {defaults})")
    parsed.add_argument(
        "--venvs", type=Path, default=Path(), metavar="DIR", help="peers, race: where .venv-<peer> are (default: here)"
    )
    parsed.add_argument("--out", type=Path, required=True, help="folder of result files")
    return parsed


def measure(args: argparse.Namespace, limit: Limit, work: Path) -> Iterable[dict[str, Any]]:
    """What the part found so far, again and again: the last one is the whole."""
    pictures, rounds = args.pictures, args.rounds
    models: list[str] = args.model or []
    model = models[0] if models else ""  # `store` and `size` need none
    images: list[int] | None = args.images
    parts: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "ladder": lambda: (
            {"rungs": rows}
            for rows in ladder(pictures, model, args.answers_model, (images or [48])[0], rounds, limit, work)
        ),
        "peers": lambda: peers.peers(pictures, model, (images or [48])[0], rounds, limit, work, args.venvs),
        "text": lambda: encoders.text(model, limit),
        "encoders": lambda: encoders.encoders(models, pictures, rounds, limit),
        "roofline": lambda: roofline.roofline(model, pictures, rounds, limit, work),
        "startup": lambda: startup.startup(model, pictures, limit, work),
        "null": lambda: null_engine.null_engine(model, images or [1000, 10_000, 100_000], rounds, limit, work),
        "race": lambda: [race.race(pictures, model, (images or [128])[0], rounds, args.venvs)],
        "memory": lambda: [memory.memory(pictures, model, images or [1000, 10_000])],
        "store": lambda: [store.store(131_072, 512, rounds)],
        "size": lambda: size.size(args.index, limit),
        "tune": lambda: settings.settings(model, pictures, rounds, limit, work),
    }
    return parts[args.what]()


def about(argv: list[str]) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", "-m", "pipeline.bench", *argv]),
        "date": time.strftime("%Y-%m-%d"),
        "host": host_id(),
        "cpu": cpu_info().get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "energy": read_energy().missing or "read",
        "versions": dict(_versions()),
        "python": platform.python_version(),
    }


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:  # such as onnxruntime, which has another name on a GPU host
            yield package, "not installed"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    if missing := [name for name in NEEDS[args.what] if getattr(args, name) is None]:
        print(f"error: bench {args.what} needs {' and '.join('--' + name for name in missing)}", file=sys.stderr)
        return USAGE
    if len(args.model or []) > 1 and args.what != "encoders":
        print(f"error: bench {args.what} takes one --model, {len(args.model)} were given", file=sys.stderr)
        return USAGE
    if args.limit is not None and args.what not in LIMITS_S:
        print(f"error: bench {args.what} has no --limit, it runs to its end", file=sys.stderr)
        return USAGE
    args.out.mkdir(parents=True, exist_ok=True)
    head, start_s = about(argv), time.monotonic()
    limit = Limit(args.limit or LIMITS_S.get(args.what, float("inf")))
    with tempfile.TemporaryDirectory() as work:
        try:
            for found in measure(args, limit, Path(work)):
                result = {**head, **found, "seconds": round(time.monotonic() - start_s, 1)}
                target = args.out / f"{args.what}.json"
                (partial := target.with_suffix(".part")).write_text(json.dumps(result, indent=1) + "\n")
                partial.replace(target)  # whoever stops it keeps what was measured until then
        except ArtifactMissing as error:
            print(f"error: {error}", file=sys.stderr)
            return USAGE
    for path in figures.write(args.what, result, args.out):
        print(path, file=sys.stderr)
    print(json.dumps({"out": str(args.out), "seconds": result["seconds"], "failed": figures.failed(result)}))
    return 1 if figures.failed(result) else DONE


if __name__ == "__main__":
    sys.exit(main())
