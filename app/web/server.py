"""Serves the app in a browser: textual-serve's protocol behind a guard, on 127.0.0.1 only."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import textual_serve
from aiohttp import WSMsgType, web
from textual_serve.app_service import AppService
from textual_serve.download_manager import DownloadManager

from app.runs.child import child_environment
from app.web.guard import Guard
from trainer.contract.errors import BusyError, UserError

HOST = "127.0.0.1"
DEFAULT_PORT = 8642
STATIC = Path(__file__).with_name("static")
THEIRS = Path(textual_serve.__file__).with_name("static")
LEAVE_S = 5.0
"""So long an app has to leave when its page is closed, or the server ends."""
COLUMNS, ROWS = range(1, 1001), range(1, 501)
FONT_SIZES = range(6, 73)
_TYPES = {"page.css": "text/css", "page.js": "text/javascript"}


class Session(AppService):
    """One app, started for one page and ended with it.

    It starts a command without a shell, in a session of its own: Ctrl-C reaches the server alone,
    which then ends its apps in order.
    """

    argv: Sequence[str] = ()

    async def _open_app_process(self, width: int = 80, height: int = 24) -> Process:
        self._process = await asyncio.create_subprocess_exec(
            *self.argv,
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            env=child_environment()
            | self._build_environment(width=width, height=height)
            | {"TERM": "xterm-256color", "COLORTERM": "truecolor"},  # the browser's, not ours
            start_new_session=os.name != "nt",
        )
        self._stdin = self._process.stdin
        return self._process

    async def end(self) -> None:
        """Ask the app to leave; one that does not is killed."""
        with suppress(asyncio.TimeoutError, ConnectionError):
            await asyncio.wait_for(self.stop(), LEAVE_S)
        process = self._process
        if process is None:
            return
        try:
            await asyncio.wait_for(process.wait(), LEAVE_S)
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


class WebApp:
    """The pages, and the apps behind them.

    Args:
        argv: starts one app that speaks Textual's protocol for browsers on its pipes.
        guard: who may come in.
    """

    def __init__(self, argv: Sequence[str], guard: Guard) -> None:
        self._argv = tuple(argv)
        self._guard = guard
        self._downloads = DownloadManager()
        self._sockets: set[web.WebSocketResponse] = set()

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        app = web.Application(middlewares=[self._guard.check])
        app.add_routes(
            [
                web.get("/", self._page),
                web.get("/ws", self._socket),
                *(web.get(f"/{name}", self._file) for name in _TYPES),
                web.static("/static", THEIRS),
            ]
        )
        app.on_shutdown.append(self._close_all)
        return app

    async def _page(self, request: web.Request) -> web.Response:
        text = (STATIC / "page.html").read_text(encoding="utf-8")
        size = _number(request, "fontsize", 16, FONT_SIZES)
        text = text.replace("{socket}", f"ws://{request.host}/ws")
        text = text.replace("{font_size}", str(size))
        return web.Response(text=text, content_type="text/html")

    async def _file(self, request: web.Request) -> web.Response:
        name = request.path.lstrip("/")
        text = (STATIC / name).read_text(encoding="utf-8")
        return web.Response(text=text, content_type=_TYPES[name])

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        page = web.WebSocketResponse(heartbeat=15, max_msg_size=2**20)
        await page.prepare(request)
        session = Session(
            "",
            write_bytes=page.send_bytes,
            write_str=page.send_str,
            close=lambda: _close(page),
            download_manager=self._downloads,
        )
        session.argv = self._argv
        self._sockets.add(page)
        try:
            await session.start(
                _number(request, "width", 80, COLUMNS), _number(request, "height", 24, ROWS)
            )
            async for message in page:
                if message.type is WSMsgType.TEXT:
                    await _pass_on(message.json(), session, page)
        except (ValueError, LookupError, TypeError):
            await page.close(message=b"not the protocol")
        finally:
            self._sockets.discard(page)
            await session.end()
        return page

    async def _close_all(self, app: web.Application) -> None:
        for page in list(self._sockets):
            await page.close(message=b"the server ends")


async def _close(page: web.WebSocketResponse) -> None:
    await page.close()


async def _pass_on(envelope: object, session: Session, page: web.WebSocketResponse) -> None:
    """Hand what the page has sent to the app.

    Raises:
        ValueError, LookupError, TypeError: it is not what textual.js sends.
    """
    if not isinstance(envelope, list):
        raise TypeError("a message is a list")
    kind = envelope[0]
    if kind == "stdin":
        await session.send_bytes(str(envelope[1]).encode())
    elif kind == "resize":
        width, height = int(envelope[1]["width"]), int(envelope[1]["height"])
        if width in COLUMNS and height in ROWS:
            await session.set_terminal_size(width, height)
    elif kind == "ping":
        await page.send_json(["pong", envelope[1]])
    elif kind == "blur":
        await session.blur()
    elif kind == "focus":
        await session.focus()


def _number(request: web.Request, name: str, otherwise: int, allowed: range) -> int:
    text = request.query.get(name, "")
    return int(text) if text.isdecimal() and int(text) in allowed else otherwise


def session_command(runs_dir: Path, *, view: bool) -> list[str]:
    """Return the command of one app."""
    return [
        sys.executable, "-m", "app.web.session", str(runs_dir), *(["--view"] if view else []),
    ]  # fmt: skip


def serve(argv: Sequence[str], token: str, port: int | None, ready: Callable[[int], None]) -> None:
    """Serve until Ctrl-C or SIGTERM; the apps are ended then.

    Args:
        argv: starts one app.
        token: what opens the door.
        port: None: `DEFAULT_PORT`, or a free one where that is taken.
        ready: called with the port once pages can be opened.

    Raises:
        BusyError: the port is taken.
        UserError: this user may not use the port.
    """
    asyncio.run(_serve(argv, token, port, ready))


def _listen(port: int | None) -> socket.socket:
    """Return a socket on a port of this machine that nobody else can reach."""
    try:
        return socket.create_server((HOST, DEFAULT_PORT if port is None else port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            if port is None:
                return socket.create_server((HOST, 0))
            raise BusyError(
                f"port {port} is taken", hint="another --port, or none: a free one is taken then"
            ) from None
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} is not for users", hint="use one from 1024 up") from None
        raise


async def _serve(
    argv: Sequence[str], token: str, port: int | None, ready: Callable[[int], None]
) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError):  # Windows: Ctrl-C raises KeyboardInterrupt
            loop.add_signal_handler(name, ended.set)
    listening = _listen(port)
    with listening:
        number = int(listening.getsockname()[1])
        pages = WebApp(argv, Guard(token, number)).application()
        runner = web.AppRunner(pages, access_log=None, shutdown_timeout=2 * LEAVE_S)
        await runner.setup()
        try:
            await web.SockSite(runner, listening).start()
            ready(number)
            await ended.wait()
        finally:
            await runner.cleanup()
