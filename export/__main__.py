"""`python -m export`: build-time commands, weights in, portable graphs out. See `--help` of each."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engines.spec import artifacts_root, default_model
from export.random_model import ARCHS, write_random_model
from export.source import ExportError
from export.to_onnx import export_artifact

EXAMPLES = """examples:
  python -m export onnx openai/clip-vit-base-patch32           # a hub id, through the Hugging Face cache
  python -m export onnx /models/my-clip --root /srv/artifacts  # a directory, no network
  python -m export random --arch ViT-B-32 /models/random-b32   # random weights in real shapes, for benchmarks
"""
RANDOM_EXAMPLES = """examples:
  python -m export random --arch ViT-B-32 /models/random-b32
  python -m export random --arch ViT-L-14 --vocab /models/clip --seed 1 /models/random-l14
"""


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        if args.command == "random":
            print(write_random_model(args.directory, args.arch, vocab=args.vocab, seed=args.seed))
        else:
            print(export_artifact(args.model, args.root).path)
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full or read-only disk
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m export", description=__doc__, epilog=EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    onnx = commands.add_parser(
        "onnx",
        help="export a model into an artifact (ONNX graphs, tokenizer, golden vectors) and print its path",
        description="Export a CLIP model into an artifact and print its path. A second run on an unchanged model does "
        "nothing. Engines are built from it by `make engines`.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    onnx.add_argument(
        "model",
        nargs="?",
        default=default_model(),
        help="hub id or directory (default: NIGHTJAR_MODEL, else %(default)s)",
    )
    onnx.add_argument(
        "--root",
        type=Path,
        default=artifacts_root(),
        help="folder of artifacts (default: NIGHTJAR_ARTIFACTS, else artifacts)",
    )
    random = commands.add_parser(
        "random",
        help="write a model directory with seeded random weights and print its path",
        description="Write a Hugging Face CLIP directory with seeded random weights: real shapes for benchmarks. "
        "Its vectors mean nothing.",
        epilog=RANDOM_EXAMPLES,
        formatter_class=raw,
    )
    random.add_argument("directory", type=Path, help="where to write; must be new or empty")
    random.add_argument("--arch", choices=sorted(ARCHS), default="ViT-B-32", help="shape (default: %(default)s)")
    random.add_argument(
        "--vocab",
        type=Path,
        help="folder with vocab.json and merges.txt, or bpe_simple_vocab_16e6.txt.gz (default: the demo vocabulary)",
    )
    random.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
