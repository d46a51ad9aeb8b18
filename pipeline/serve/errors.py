"""What a client is told when it gets no answer."""

from __future__ import annotations

from collections.abc import Mapping

RETRY_AFTER_S = 1


class Refusal(Exception):
    """An answer other than 200: `words` say what was given, what was expected and what to do."""

    def __init__(self, status: int, words: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(words)
        self.status, self.words = status, words
        wait_s = RETRY_AFTER_S if status == 503 and retry_after_s is None else retry_after_s
        self.headers: Mapping[str, str] = {} if wait_s is None else {"retry-after": str(wait_s)}


def busy(what: str) -> Refusal:
    return Refusal(503, f"{what}; try again after a moment")
