"""`menma serve`: who gets in, what a page gets, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import psutil
import pytest
from app_runs import ENVIRONMENT, wait_for
from test_tui import finished_run

aiohttp = pytest.importorskip("aiohttp", reason="textual-serve is not installed")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
PATIENCE_S = 90.0
_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[@-_])")


class Served:
    """A server in a folder of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        environment = ENVIRONMENT | {
            "XDG_STATE_HOME": str(folder / "state"),
            "XDG_CONFIG_HOME": str(folder / "config"),
        }
        command = [sys.executable, "-m", "app", "serve", "--port", "0", *options]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, text=True,
            stdout=subprocess.PIPE, stderr=(folder / "words").open("w"),
        )  # fmt: skip
        self.address = self.process.stdout.readline().strip()
        self.base, _, self.token = self.address.partition("/?token=")
        self.port = int(self.base.rpartition(":")[2])
        self.cookie = {"Cookie": f"menma-{self.port}={self.token}"}

    def words(self) -> str:
        return (self.folder / "words").read_text()

    def apps(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    finished_run(folder / "runs")
    server = Served(folder)
    yield server
    server.end()


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it ended between the two
        return False


def status(served: Served, path: str = "/", **headers: str) -> tuple[int, dict[str, str], str]:
    async def ask() -> tuple[int, dict[str, str], str]:
        async with aiohttp.ClientSession() as session:
            where = session.get(served.base + path, headers=headers, allow_redirects=False)
            async with where as answer:
                return answer.status, dict(answer.headers), await answer.text()

    return asyncio.run(ask())


def test_it_prints_the_address_and_the_way_through_ssh(served):
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{32}", served.address)
    wait_for(lambda: "Ctrl-C" in served.words())
    assert f"ssh -L {served.port}:127.0.0.1:{served.port} " in served.words()


def test_without_the_token_nothing_is_shown(served):
    for path in ("/", "/ws", "/page.js", "/static/js/textual.js", "/nothing"):
        assert status(served, path)[0] == 401, path
    assert status(served, "/?token=wrong")[0] == 401
    assert status(served, Cookie=f"menma-{served.port}=wrong")[0] == 401


def test_with_the_token_comes_a_cookie_and_then_the_page(served):
    code, headers, _ = status(served, f"/?token={served.token}")
    assert (code, headers["Location"]) == (302, "/")
    cookie = headers["Set-Cookie"]
    assert {"HttpOnly", "SameSite=Strict"} <= set(cookie.split("; "))
    code, headers, page = status(served, Cookie=cookie.partition(";")[0])
    assert code == 200
    assert f"ws://127.0.0.1:{served.port}/ws" in page
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")
    for path in re.findall(r'(?:src|href)="(/[^"]+)"', page):
        assert status(served, path, **served.cookie)[0] == 200, path
    assert re.findall(r"https?://", page) == []


def test_foreign_pages_and_foreign_names_are_refused(served):
    foreign = {"Origin": "http://evil.example"}
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade"}
    assert status(served, **served.cookie, **foreign)[0] == 403
    assert status(served, "/ws", **served.cookie, **foreign, **upgrade)[0] == 403
    assert status(served, "/ws", **served.cookie, **upgrade)[0] == 403  # not from a page at all
    assert status(served, **served.cookie, Origin=f"http://127.0.0.1:{served.port}")[0] == 200
    assert status(served, **served.cookie, Host="evil.example")[0] == 403
    assert status(served, **served.cookie, Host="127.0.0.1.evil.example")[0] == 403
    assert status(served, **served.cookie, Host='127.0.0.1:1"><script>')[0] == 403
    assert status(served, **served.cookie, Host=f"localhost:{served.port}")[0] == 200


def test_only_this_machine_can_reach_it(served):
    (listening,) = [
        c for c in psutil.Process(served.process.pid).net_connections("tcp") if c.status == "LISTEN"
    ]
    assert listening.laddr.ip == "127.0.0.1"


class Page:
    """What a browser's page sees."""

    def __init__(self, link: aiohttp.ClientWebSocketResponse) -> None:
        self._link, self._seen = link, ""

    async def sees(self, words: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while words not in self._seen:
                message = await self._link.receive()
                assert message.type in {aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.TEXT}, (
                    self._seen
                )
                if message.type is aiohttp.WSMsgType.BINARY:
                    self._seen += _ESCAPES.sub("", message.data.decode("utf-8", "replace"))
        self._seen = ""

    async def send(self, *envelope: object) -> None:
        await self._link.send_str(json.dumps(envelope))


def on_page(served: Served, act: Callable[[Page], Awaitable[None]]) -> None:
    async def work() -> None:
        headers = {**served.cookie, "Origin": served.base}
        address = f"ws://127.0.0.1:{served.port}/ws?width=100&height=30"
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(address, headers=headers) as link,
        ):
            await act(Page(link))

    asyncio.run(work())


@pytest.mark.slow
def test_a_page_shows_the_app_takes_keys_and_ends_it_when_it_is_closed(served):
    async def act(page: Page) -> None:
        await page.sees("fish")
        await page.send("resize", {"width": 90, "height": 20})
        await page.send("stdin", "\r")
        await page.sees("it is warm")
        assert len(served.apps()) == 1

    on_page(served, act)
    wait_for(lambda: not served.apps(), PATIENCE_S)
    assert served.process.poll() is None


@pytest.mark.slow
def test_nonsense_ends_the_page_and_not_the_server(served):
    async def act(page: Page) -> None:
        await page.sees("fish")
        await page.send("resize", 3)
        with pytest.raises(AssertionError):
            await page.sees("never")

    on_page(served, act)
    wait_for(lambda: not served.apps(), PATIENCE_S)
    assert status(served, **served.cookie)[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_to_look_only_and_no_app_outlives_its_server(tmp_path, number):
    finished_run(tmp_path / "runs")
    served = Served(tmp_path, "--view")
    left: list[psutil.Process] = []

    async def act(page: Page) -> None:
        await page.sees("look only")
        await page.send("stdin", "P")
        await page.sees("It was opened")
        left.extend(served.apps())
        served.process.send_signal(number)
        async with asyncio.timeout(PATIENCE_S):
            while not (await page._link.receive()).type.name.startswith("CLOS"):
                pass

    try:
        on_page(served, act)
        code = served.process.wait(PATIENCE_S)
        assert code == (0 if number == signal.SIGINT else -number)
        assert left
        wait_for(lambda: not any(map(lives, left)))
        assert not (tmp_path / "state/menma/queue").exists()
        if number == signal.SIGINT:
            assert "Traceback" not in served.words()
    finally:
        served.end()


def test_a_port_that_is_taken_is_said(menma):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        code, _, err = menma("serve", "--port", number)
    assert (code, f"port {number} is taken" in err) == (3, True)


def test_without_the_package_it_says_what_to_install(menma, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = menma("serve")
    assert (code, "pip install textual-serve" in err) == (2, True)


class Browser:
    """Chromium, spoken to by its DevTools protocol."""

    def __init__(self, link: aiohttp.ClientWebSocketResponse) -> None:
        self._link, self._number = link, 0
        self.requests: list[str] = []
        self.received = ""

    async def do(self, method: str, **parameters: object) -> dict:
        self._number += 1
        number = self._number
        await self._link.send_json({"id": number, "method": method, "params": parameters})
        while True:
            answer = await self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    async def _next(self) -> dict:
        async with asyncio.timeout(PATIENCE_S):
            message = await self._link.receive_json()
        parameters = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        if message.get("method") == "Network.webSocketFrameReceived":
            frame = parameters["response"]
            if frame["opcode"] == 2:  # what is drawn
                data = base64.b64decode(frame["payloadData"]).decode("utf-8", "replace")
                self.received += _ESCAPES.sub("", data)
        return message

    async def receives(self, words: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while words not in self.received:
                await self._next()
        self.received = ""

    async def eventually(self, expression: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not (await self.do("Runtime.evaluate", expression=expression))["result"]["value"]:
                await asyncio.sleep(0.1)

    async def picture(self) -> bytes:
        return base64.b64decode((await self.do("Page.captureScreenshot"))["data"])


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_in_a_real_browser_the_app_is_drawn_and_keys_work(served, tmp_path):
    arguments = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", "--disable-background-networking", "--remote-debugging-port=0",
        f"--user-data-dir={tmp_path}/profile", "--window-size=1000,600", "about:blank",
    ]  # fmt: skip
    log = tmp_path / "chromium.log"
    with log.open("w") as words:
        process = subprocess.Popen(
            arguments, stdout=words, stderr=words, start_new_session=True,
            env=os.environ | {"HOME": str(tmp_path)},
        )  # fmt: skip
    try:
        port_file = tmp_path / "profile/DevToolsActivePort"
        wait_for(lambda: port_file.exists() and port_file.read_text().strip(), PATIENCE_S)
        before, after = asyncio.run(_browse(served, int(port_file.read_text().split()[0])))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert _num_colours(before) > 8, "text is drawn, not an empty page"
    assert before != after
    wait_for(lambda: not served.apps(), PATIENCE_S)


async def _browse(served: Served, port: int) -> tuple[bytes, bytes]:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json") as answer:
            pages = [page for page in await answer.json() if page["type"] == "page"]
        where = session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=2**26)
        async with where as link:
            browser = Browser(link)
            await browser.do("Network.enable")
            await browser.do("Page.enable")
            await browser.do("Page.navigate", url=served.address)
            await browser.receives("fish")
            await browser.eventually("document.body.classList.contains('-first-byte')")
            await browser.eventually("document.querySelectorAll('canvas').length > 0")
            await browser.eventually("document.fonts.check('16px \"Roboto Mono\"')")
            place = await browser.do("Runtime.evaluate", expression="location.href")
            assert place["result"]["value"] == f"{served.base}/", "the token is not in the address"
            before = await browser.picture()
            for kind in ("keyDown", "keyUp"):  # the terminal has the focus without a click
                await browser.do(
                    "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r",
                    windowsVirtualKeyCode=13,
                )  # fmt: skip
            await browser.receives("it is warm")
            after = await browser.picture()
            foreign = [
                url for url in browser.requests if not url.startswith((served.base, "data:"))
            ]
            assert foreign == [], "nothing is loaded from elsewhere"
            return before, after


def _num_colours(picture: bytes) -> int:
    import io

    from PIL import Image

    return len(Image.open(io.BytesIO(picture)).convert("RGB").getcolors(2**24) or ())
