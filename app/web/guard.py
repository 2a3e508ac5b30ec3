"""Who may see the app in a browser: who has the token, from a page of our own, on this machine."""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable, Callable

from aiohttp import web

LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?")
"""Names of this machine; another one in `Host` is a name that somebody has pointed at it."""
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Lets requests through, or answers them itself.

    Args:
        token: what opens the door; new for each start of the server.
        port: of the server; cookies know no ports, so it is in their name.
    """

    def __init__(self, token: str, port: int) -> None:
        self._token = token
        self.cookie = f"menma-{port}"

    @web.middleware
    async def check(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Answer 403 to other hosts and foreign pages, 401 without the token, 302 + cookie with."""
        response: web.StreamResponse | None = self._refusal(request)
        if response is None:
            has_token = "token" in request.query and request.path == "/"
            response = self._welcome() if has_token else await handler(request)
        if not response.prepared:
            response.headers.update(_HEADERS)
            response.headers["Content-Security-Policy"] = _policy(request.host)
        return response

    def _refusal(self, request: web.Request) -> web.Response | None:
        if not LOOPBACK.fullmatch(request.host):
            return web.Response(status=403, text="Open it as 127.0.0.1 or localhost.\n")
        origin = request.headers.get("Origin")
        is_socket = request.headers.get("Upgrade", "").lower() == "websocket"
        if (origin is not None or is_socket) and origin != f"http://{request.host}":
            return web.Response(status=403, text="Only its own page may talk to it.\n")
        given = request.query.get("token", "") or request.cookies.get(self.cookie, "")
        if not secrets.compare_digest(given.encode(), self._token.encode()):
            text = "It needs the address that `menma serve` has printed, with its token.\n"
            return web.Response(status=401, text=text)
        return None

    def _welcome(self) -> web.Response:
        """Keep the token in a cookie, and out of the address."""
        response = web.Response(status=302, headers={"Location": "/"})
        response.set_cookie(self.cookie, self._token, httponly=True, samesite="Strict", path="/")
        return response


def new_token() -> str:
    """Return 192 random bits as text."""
    return secrets.token_urlsafe(24)


def _policy(host: str) -> str:
    """Return what the page may load: nothing of other hosts."""
    return (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; font-src 'self'; "
        f"connect-src 'self' ws://{host}; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
