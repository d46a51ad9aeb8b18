"""The command line of the service, and the one frozen object that comes of it."""

from __future__ import annotations

import argparse
import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

from engines.hardware import physical_cores
from pipeline.config import UsageError, only_index_here

TOKEN_VARIABLE = "NIGHTJAR_TOKEN"
TOKEN_CHARACTERS_MIN = 16
EXAMPLES = """examples:
  python -m pipeline.serve --out inat2021-index                        http://127.0.0.1:8080, this machine alone
  NIGHTJAR_TOKEN=$(openssl rand -hex 24) python -m pipeline.serve --address 0.0.0.0 --port 8080
  python -m pipeline.serve --token-file /etc/nightjar/token --behind-proxy 127.0.0.1 --host-name pictures.example.org

SIGTERM: no new connections, open requests are answered, exit 0. exit codes: 0 done, 1 failed, 2 usage"""


@dataclass(frozen=True)
class ServeConfig:
    out: Path
    model: str | None
    address: str
    port: int
    token: str | None = field(repr=False)
    host_names: frozenset[str]  # the Host headers that are answered; empty: any
    proxy: str | None  # whose X-Forwarded-For and -Proto are believed
    deadline_s: float
    queue: int  # requests in hand, of each kind
    upload_bytes: int
    rate_per_s: float  # units of work per client
    cache_bytes: int
    workers: int  # decoder processes
    drain_s: float


def serve_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.serve", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Answer questions to an index over HTTP: a page, a JSON API, embeddings, pictures.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="the index (default: the only ./*-index here)")
    parser.add_argument("--model", help="hub id or directory (default: the model the index was made with)")
    parser.add_argument("--address", default="127.0.0.1", help="to listen at; any but loopback needs a token")
    parser.add_argument("--port", type=int, default=8080, help="0: a free one (default: %(default)s)")
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help=f"whose first line is the token (or ${TOKEN_VARIABLE})"
    )
    parser.add_argument(
        "--host-name", action="append", default=[], metavar="NAME", help="a Host that is answered; repeat it"
    )
    parser.add_argument("--behind-proxy", metavar="ADDRESS", help="believe X-Forwarded-For and -Proto of this proxy")
    parser.add_argument(
        "--deadline", type=float, default=10.0, metavar="S", help="of one request (default: %(default)s)"
    )
    parser.add_argument(
        "--queue", type=int, default=256, metavar="N", help="requests in hand, then 503 (default: %(default)s)"
    )
    parser.add_argument(
        "--upload-mb", type=int, default=20, metavar="MB", help="of one request's body (default: %(default)s)"
    )
    parser.add_argument(
        "--rate",
        type=float,
        default=50.0,
        metavar="N",
        help="questions per second of one client (default: %(default)s)",
    )
    parser.add_argument(
        "--cache-mb", type=int, default=256, metavar="MB", help="of thumbnails in memory (default: %(default)s)"
    )
    parser.add_argument(
        "--drain", type=float, default=30.0, metavar="S", help="for open requests after SIGTERM (default: %(default)s)"
    )
    return parser


def parse_serve(argv: list[str] | None) -> ServeConfig:
    """
    Raises:
        UsageError: one line, with the remedy.
    """
    args = serve_parser().parse_args(argv)
    for name in ("deadline", "queue", "upload_mb", "rate", "cache_mb", "drain"):
        if (value := getattr(args, name)) <= 0:
            raise UsageError(f"--{name.replace('_', '-')} is {value:g}; it must be above 0")
    if not 0 <= args.port <= 65535:
        raise UsageError(f"--port is {args.port}; it is 1 to 65535, or 0 for a free one")
    token = _token(args.token_file)
    if token is None and not is_loopback(args.address):
        raise UsageError(
            f"--address {args.address} can be reached from other machines, so a token is needed: set ${TOKEN_VARIABLE} "
            f"or give --token-file, with at least {TOKEN_CHARACTERS_MIN} characters (openssl rand -hex 24)"
        )
    names = frozenset(name.lower() for name in args.host_name)
    if token is None:  # a foreign page whose name was bound to this address must not read the index through a browser
        names |= {"localhost", "127.0.0.1", "::1", args.address}
    return ServeConfig(
        out=args.out or only_index_here(),
        model=args.model,
        address=args.address,
        port=args.port,
        token=token,
        host_names=names,
        proxy=args.behind_proxy,
        deadline_s=args.deadline,
        queue=args.queue,
        upload_bytes=args.upload_mb << 20,
        rate_per_s=args.rate,
        cache_bytes=args.cache_mb << 20,
        workers=max(2, physical_cores()),
        drain_s=args.drain,
    )


def is_loopback(address: str) -> bool:
    """A name that has to be looked up is none, but for localhost."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _token(file: Path | None) -> str | None:
    # Out of the environment: decoders are children of this process, and what takes one over must not find it there.
    token = os.environ.pop(TOKEN_VARIABLE, None)
    origin = f"${TOKEN_VARIABLE}"
    if file is not None:
        try:
            token, origin = next(iter(file.read_text(encoding="utf-8").splitlines()), ""), f"--token-file {file}"
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--token-file {file} cannot be read: {error}") from None
    if token is None:
        return None
    token = token.strip()
    if len(token) < TOKEN_CHARACTERS_MIN or not (token.isascii() and token.isprintable()):
        raise UsageError(
            f"the token of {origin} has {len(token)} characters; it needs at least {TOKEN_CHARACTERS_MIN}, all of them "
            "printable ASCII: openssl rand -hex 24"
        )
    return token
