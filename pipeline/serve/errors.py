"""What a client is told when it gets no answer."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

RETRY_AFTER_S = 1
OPENAI_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


class Refusal(Exception):
    """An answer other than 200: `words` say what was given, what was expected and what to do."""

    def __init__(self, status: int, words: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(words)
        self.status, self.words = status, words
        wait_s = RETRY_AFTER_S if status == 503 and retry_after_s is None else retry_after_s
        self.headers: Mapping[str, str] = {} if wait_s is None else {"retry-after": str(wait_s)}


    def answer(self, path: str) -> JSONResponse:
        return told(path, self.status, self.words, self.headers)


def busy(what: str) -> Refusal:
    return Refusal(503, f"{what}; try again after a moment")


def told(path: str, status: int, words: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """`words` as JSON; below /v1 in the form that OpenAI's clients read, whichever layer refuses."""
    if not path.startswith("/v1/"):
        return JSONResponse({"error": words}, status, headers)
    kind = "invalid_request_error" if status < 500 else "server_error"
    openai = {"message": words, "type": kind, "param": None, "code": OPENAI_CODES.get(status)}
    return JSONResponse({"error": openai}, status, headers)
