"""The token: who has it may ask. Compared in constant time, never stored in a browser, never logged."""

from __future__ import annotations

import hmac
import time
from http.cookies import CookieError, SimpleCookie

COOKIE = "nightjar"
SESSION_S = 30 * 24 * 3600


def is_token(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def new_session(token: str) -> str:
    """What a browser holds in place of the token: an end, and proof that the token was known."""
    end = str(int(time.time()) + SESSION_S)
    return f"{end}.{_proof(end, token)}"


def is_session(cookie_header: str, token: str) -> bool:
    try:
        morsel = SimpleCookie(cookie_header).get(COOKIE)
    except CookieError:
        return False
    end, _, proof = (morsel.value if morsel is not None else "").partition(".")
    if not (end.isascii() and end.isdecimal() and len(end) <= 12 and proof.isascii()):
        return False
    return hmac.compare_digest(proof, _proof(end, token)) and int(end) > time.time()


def session_cookie(token: str, *, https: bool) -> str:
    secure = "; Secure" if https else ""
    return f"{COOKIE}={new_session(token)}; Path=/; Max-Age={SESSION_S}; HttpOnly; SameSite=Strict{secure}"


def _proof(end: str, token: str) -> str:
    return hmac.new(token.encode(), b"nightjar session " + end.encode(), "sha256").hexdigest()
