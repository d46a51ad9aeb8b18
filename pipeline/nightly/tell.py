"""Who is told about a night: a log of JSON lines, Prometheus and, where it failed, a webhook."""

from __future__ import annotations

import http.client
import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.config import UsageError
from pipeline.exits import BUDGET_SPENT, DONE, LOCKED
from pipeline.nightly.config import Nightly, WebhookTable
from pipeline.nightly.metrics import write_metrics
from pipeline.run_reports import write_night

log = logging.getLogger("nightjar")


class JsonLines(logging.Formatter):
    """One object per record; the last one of a night carries its whole result."""

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told | getattr(record, "more", {}))


def write_log(path: Path) -> None:
    try:
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"log file {path}: {error.strerror}; its folder has to be there") from None
    handler.setFormatter(JsonLines())
    logging.getLogger().addHandler(handler)


def tell_all(plan: Nightly, night: Mapping[str, Any]) -> None:
    """`night` is the JSON of its last line."""
    level = logging.INFO if night["exit"] in (DONE, BUDGET_SPENT) else logging.ERROR
    log.log(level, "%s", night["words"], extra={"more": {"night": night}})
    if night["exit"] != LOCKED and (plan.index.out / "runs").is_dir():  # another night's turn, or no index yet
        try:
            write_night(plan.index.out, night)
        except OSError as error:
            log.error("nothing of this night for pipeline.status in %s: %s", plan.index.out / "runs", error.strerror)
    if plan.report.metrics is not None:
        try:
            write_metrics(plan.report.metrics, night)
        except (OSError, ValueError) as error:
            log.error("no metrics in %s: %s", plan.report.metrics, error)
    if plan.webhook is not None and night["exit"] not in (DONE, BUDGET_SPENT):
        post(plan.webhook, night)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The header is for this server, not for whoever it points at."""

    def redirect_request(self, *args: Any) -> None:
        return None


def post(hook: WebhookTable, night: Mapping[str, Any]) -> bool:
    """Whether it was taken; that it was not is logged and nothing more, for the night is what it is."""
    host = urlsplit(hook.url).hostname
    headers = {"Content-Type": "application/json"}
    if hook.header_env is not None:
        headers[hook.header] = os.environ[hook.header_env]
    body = {"text": f"nightjar: {night['index']}: exit {night['exit']}: {night['words']}", **night}
    try:
        request = urllib.request.Request(hook.url, json.dumps(body).encode(), headers, method="POST")
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=hook.timeout_s) as answer:
            answer.read(1)
    except urllib.error.HTTPError as error:
        log.error("the webhook at %s answered %d", host, error.code)
    except (OSError, http.client.HTTPException, ValueError) as error:
        # Not all of its words: they may hold the address or the header. What the system calls it never does.
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        told = getattr(reason, "strerror", None) or type(reason).__name__
        log.error("the webhook at %s could not be reached: %s", host, told)
    else:
        return True
    return False
