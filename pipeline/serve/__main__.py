"""`python -m pipeline.serve`: answers until it is told to stop. See docs/serve.md."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from engines import EngineUnavailable
from engines.spec import ArtifactMissing
from pipeline.config import UsageError
from pipeline.exits import DONE, FAILED, USAGE
from pipeline.serve.app import Service, build_app
from pipeline.serve.connections import Connection
from pipeline.serve.metrics import Metrics
from pipeline.serve.settings import ServeConfig, parse_serve
from pipeline.store import NoIndex, StoreError

log = logging.getLogger("nightjar")
BACKLOG = 1024
KEEP_ALIVE_S = 65  # above the 60 s of common proxies, which else reuse a connection that was just closed


class Server(uvicorn.Server):
    """SIGTERM and SIGINT: no new connections, open requests are answered, exit 0. A second one exits at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        yield

    def _stop(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


def listen(cfg: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in cfg.address else socket.AF_INET
    # The protocol is named, because asyncio sets TCP_NODELAY for nothing else: 40 ms an answer without it.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((cfg.address, cfg.port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise UsageError(f"cannot listen at {cfg.address} port {cfg.port}: {error.strerror or error}") from error
    return sock


def serve(cfg: ServeConfig, sock: socket.socket) -> None:
    app = build_app(Service(cfg, Metrics()))
    config = uvicorn.Config(
        app, http=Connection, ws="none", loop="asyncio", lifespan="on", log_config=None, access_log=False,
        server_header=False, timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=int(cfg.drain_s) or 1,
        proxy_headers=cfg.proxy is not None, forwarded_allow_ips=cfg.proxy or "",
    )  # fmt: skip
    host, port = sock.getsockname()[:2]
    print(json.dumps({"address": f"http://{f'[{host}]' if ':' in host else host}:{port}/"}), flush=True)
    Server(config).run([sock])


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    try:
        cfg = parse_serve(argv)
        with listen(cfg) as sock:
            serve(cfg, sock)
    except (UsageError, ArtifactMissing, EngineUnavailable, NoIndex) as error:
        log.error("error: %s", error)
        return USAGE
    except (StoreError, OSError) as error:
        log.error("error: %s", error)
        return FAILED
    return DONE


if __name__ == "__main__":
    sys.exit(main())
