"""The outermost layer: which requests get in, and what every answer carries.

In order: a Host that is ours (without a token, a foreign page could reach a loopback address through its own name), the
token, and the client's share of work. Health can be asked without a token, as balancers do; it tells nothing.
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.serve.errors import Refusal
from pipeline.serve.metrics import Metrics
from pipeline.serve.settings import ServeConfig
from pipeline.serve.tokens import is_session, is_token, session_cookie

OPEN_PATHS = frozenset({"/healthz", "/login", "/style.css"})  # the login form has its looks
# Units of work a request takes from its client's share; an embedding takes one more for every further row.
COSTS = {"api": 1.0, "v1": 1.0, "healthz": 1.0, "login": 5.0, "thumb": 0.1, "picture": 0.5}
WRONG_TOKEN_COST = 5.0  # guessing is slow
BURST_S = 4.0  # of its rate that a client may have saved
CLIENTS_MAX = 10_000
HEADERS = {  # of every answer that does not say otherwise
    "cache-control": "no-store",
    "content-security-policy": (
        "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
RAW_HEADERS = [(name.encode(), value.encode()) for name, value in HEADERS.items()]


class Shares:
    """A bucket of work for every client, refilled at `rate_per_s`."""

    def __init__(self, rate_per_s: float) -> None:
        self._rate_per_s, self._full = rate_per_s, rate_per_s * BURST_S
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> units, when

    def take(self, client: str, cost: float) -> None:
        """
        Raises:
            Refusal: 429 with the wait; what costs more than a full bucket leaves a debt, so that it is possible at all.
        """
        now_s = time.monotonic()
        units, then_s = self._left.pop(client, (self._full, now_s))
        units = min(self._full, units + (now_s - then_s) * self._rate_per_s)
        enough = units >= min(cost, self._full)
        self._left[client] = (units - cost if enough else units, now_s)
        if len(self._left) > CLIENTS_MAX:
            self._left.popitem(last=False)
        if not enough:
            wait_s = int((min(cost, self._full) - units) / self._rate_per_s) + 1
            words = f"more than {self._rate_per_s:g} questions per second; try again in {wait_s} s"
            raise Refusal(429, words, retry_after_s=wait_s)


class Guard:
    def __init__(self, app: ASGIApp, cfg: ServeConfig, metrics: Metrics) -> None:
        self._app, self._cfg, self._metrics = app, cfg, metrics
        self._shares = Shares(cfg.rate_per_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                raise RuntimeError("no route takes a websocket")
            await self._app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(one for one in RAW_HEADERS if one[0] not in given)]
            await send(message)

        try:
            early = self._admit(scope)
        except Refusal as refusal:
            self._metrics.refused.labels(str(refusal.status)).inc()
            early = refusal.answer(scope["path"])
        await (early or self._app)(scope, receive, send_safely)

    def _admit(self, scope: Scope) -> Response | None:
        """None: it may pass; or the answer in its place.

        Raises:
            Refusal: 401, 421, 429.
        """
        headers, path, client = Headers(scope=scope), scope["path"], client_of(scope)
        if self._cfg.host_names and _host_name(headers.get("host", "")) not in self._cfg.host_names:
            raise Refusal(421, "this name of the service is unknown to it; start it with --host-name NAME")
        token = self._cfg.token
        if token is not None and path not in OPEN_PATHS:
            if early := self._exchange(scope, token, client):
                return early
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() == "bearer":
                if not is_token(given.strip(), token):
                    self._shares.take(client, WRONG_TOKEN_COST)
                    raise Refusal(401, "the token is wrong")
            elif not is_session(headers.get("cookie", ""), token):
                if path == "/":
                    return RedirectResponse("login", 303)
                raise Refusal(401, "a token is needed: Authorization: Bearer TOKEN, or log in at /login")
        if cost := COSTS.get(path.split("/")[1], 0.0):
            self._shares.take(client, cost)
            scope["state"]["charge"] = lambda units: self._shares.take(client, units)
        return None

    def _exchange(self, scope: Scope, token: str, client: str) -> Response | None:
        """`/?token=...` becomes a cookie, and the token leaves the address bar."""
        query = parse_qsl(scope["query_string"].decode("ascii", "replace"))
        given = dict(query).get("token")
        if scope["path"] != "/" or given is None:
            return None
        if not is_token(given, token):
            self._shares.take(client, WRONG_TOKEN_COST)
            raise Refusal(401, "the token is wrong")
        rest = urlencode([(name, value) for name, value in query if name != "token"])
        cookie = session_cookie(token, https=scope["scheme"] == "https")
        return RedirectResponse(f"./?{rest}" if rest else "./", 303, {"set-cookie": cookie})


def client_of(scope: Scope) -> str:
    """An IPv6 client owns its /64."""
    host = scope["client"][0] if scope["client"] else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return host


def _host_name(host: str) -> str:
    name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    return name.lower().rstrip(".")
