"""The app on real terminals: whatever ends it, the terminal can be used afterwards."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from app_runs import ENVIRONMENT, wait_for
from terminals import Terminal
from test_tui import finished_run
from textual.drivers._writer_thread import MAX_QUEUED_WRITES, WriterThread

from app.tui.running import lost_output_dropped

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="signals and terminals of POSIX"),
]
PATIENCE_S = 180.0
APP = (sys.executable, "-m", "app")
CRASHES = (
    sys.executable,
    "-c",
    "import sys, app.tui.screens.jobs as j, app.cli.main as m\n"
    "def crash(self):\n    password = 'of the user'\n    raise RuntimeError('it broke')\n"
    "j.JobsScreen.action_pause = crash\n"
    "sys.exit(m.run([]))",
)
LEFT = ("\x1b[?1049l", "\x1b[?25h", "\x1b[?1003l", "\x1b[?2004l")
"""Main screen, cursor, no mouse, no bracketed paste."""


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Terminal]]:
    """Return a starter of programs on a terminal, in a folder with one run."""
    finished_run(tmp_path / "runs")
    made: list[Terminal] = []

    def make(command=APP, size=(80, 24), **variables: str) -> Terminal:
        own = {"TERM": "xterm-256color", "XDG_STATE_HOME": str(tmp_path / "state"),
               "XDG_CONFIG_HOME": str(tmp_path / "config")}  # fmt: skip
        environment = {k: v for k, v in ENVIRONMENT.items() if k not in {"NO_COLOR", "COLORTERM"}}
        made.append(
            Terminal(command, cwd=tmp_path, environment=environment | own | variables, size=size)
        )
        return made[-1]

    yield make
    for terminal in made:
        terminal.end()


def in_order(terminal: Terminal) -> None:
    """Check that the terminal was left as it was found."""
    wait_for(lambda: all(part in terminal.output for part in LEFT), PATIENCE_S)
    after_all = terminal.output.rpartition("\x1b[?1049h")[2]
    assert all(part in after_all for part in LEFT)
    assert terminal.modes() == terminal.modes_before


def last_words(terminal: Terminal) -> str:
    """Return what was said after the app was left; its reader may be behind the program's end."""
    said = re.sub(r"\x1b\[[0-9;]*m", "", terminal.output.rpartition("\x1b[<u")[2])
    return " ".join(said.split())


def test_q_leaves_the_terminal_in_order(start):
    terminal = start()
    wait_for(lambda: "fish" in terminal.output, PATIENCE_S)
    terminal.send("q")
    assert terminal.process.wait(PATIENCE_S) == 0
    in_order(terminal)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_it_in_order(start, number):
    terminal = start()
    wait_for(lambda: "fish" in terminal.output, PATIENCE_S)
    terminal.process.send_signal(number)
    assert terminal.process.wait(PATIENCE_S) == 128 + number
    in_order(terminal)
    assert "Traceback" not in terminal.output


def test_a_closed_terminal_ends_the_app(start, tmp_path):
    terminal = start()
    wait_for(lambda: "fish" in terminal.output, PATIENCE_S)
    terminal.close()
    assert terminal.process.wait(PATIENCE_S) != 0
    assert not (tmp_path / "state/menma/crash.log").exists(), "that is no mistake of its own"


def test_a_terminal_that_takes_no_output_stops_nobody():
    """Found as a process that had outlived its window: it waited for room in a queue."""

    class Gone:
        def write(self, text: str) -> None:
            raise OSError(errno.EIO, "the window is closed")

        def flush(self) -> None:
            raise AssertionError

    with lost_output_dropped():
        output = WriterThread(Gone())
        output.start()

        def use() -> None:
            for _ in range(3 * MAX_QUEUED_WRITES):
                output.write("a line")
            output.stop()

        user = threading.Thread(target=use, daemon=True)
        user.start()
        user.join(PATIENCE_S)
        assert not user.is_alive()


def test_a_crash_leaves_it_in_order_and_says_where_its_details_are(start, tmp_path):
    terminal = start(CRASHES)
    wait_for(lambda: "fish" in terminal.output, PATIENCE_S)
    terminal.send("P")
    assert terminal.process.wait(PATIENCE_S) == 1
    in_order(terminal)
    log = tmp_path / "state/menma/crash.log"
    wait_for(lambda: last_words(terminal).endswith("go on."))
    told = f"error: the app has crashed. Details: {log}. Runs and jobs go on."
    assert last_words(terminal) == told
    text = log.read_text()
    assert "RuntimeError: it broke" in text
    assert "of the user" not in text, "no values of variables"


def test_a_crash_where_nothing_can_be_kept_shows_its_details(start):
    terminal = start(CRASHES, XDG_STATE_HOME="/dev/null")
    wait_for(lambda: "fish" in terminal.output, PATIENCE_S)
    terminal.send("P")
    assert terminal.process.wait(PATIENCE_S) == 1
    in_order(terminal)
    wait_for(lambda: last_words(terminal).endswith("go on."))
    assert "RuntimeError: it broke" in terminal.output
    assert "could not be kept" in last_words(terminal)


def test_a_window_that_is_too_small_gets_words_and_the_list_when_it_grows(start):
    # Left by a parent that uses readline, as these tests' own may be: not this window's size.
    terminal = start(size=(40, 10), COLUMNS="80", LINES="24")
    wait_for(lambda: "is too small" in terminal.output, PATIENCE_S)
    assert "40 x 10" in terminal.output
    terminal.set_size((80, 24))
    terminal.process.send_signal(signal.SIGWINCH)
    wait_for(lambda: "fish" in terminal.output, PATIENCE_S)
    terminal.send("q")
    assert terminal.process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_terminal_that_cannot_draw_gets_plain_help(start, term):
    terminal = start(TERM=term)
    assert terminal.process.wait(PATIENCE_S) == 0
    wait_for(lambda: "Commands:" in terminal.output)
    assert "\x1b" not in terminal.output


def test_without_a_terminal_the_help_is_plain_and_so_is_the_list(start, tmp_path):
    terminal = start()
    terminal.end()
    environment = ENVIRONMENT | {"TERM": "xterm-256color", "XDG_STATE_HOME": str(tmp_path)}
    for arguments, words in (((), "Commands:"), (("runs", "list"), "fish")):
        done = subprocess.run(
            [*APP, *arguments], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0
        assert words in done.stdout
        assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_what_is_copied_in_tmux_is_in_its_buffer(tmp_path):
    finished_run(tmp_path / "runs")
    environment = ENVIRONMENT | {
        "TERM": "xterm-256color", "XDG_STATE_HOME": str(tmp_path / "state"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
    }  # fmt: skip

    def tmux(*arguments: str) -> str:
        command = ["tmux", "-S", str(tmp_path / "tmux"), "-f", "/dev/null", *arguments]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True
        ).stdout

    try:
        tmux("new-session", "-d", "-x", "80", "-y", "24", f"{sys.executable} -m app")
        wait_for(lambda: "fish" in tmux("capture-pane", "-p"), PATIENCE_S)
        tmux("send-keys", "6")
        wait_for(lambda: "6 SYS" in tmux("capture-pane", "-p"), PATIENCE_S)
        wait_for(lambda: "torch" in tmux("capture-pane", "-p"), PATIENCE_S)
        tmux("send-keys", "y")
        wait_for(lambda: "torch" in tmux("show-buffer"), PATIENCE_S)
    finally:
        tmux("kill-server")


SCREENS = {
    "2": "2 CONFIG",
    "3": "3 MON",
    "5": "5 LIB",
    "6": "6 SYS",
    "1": "1 JOBS",
}


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
@pytest.mark.parametrize(
    "variables", [{"TERM": "xterm-256color"}, {"TERM": "screen"}, {"NO_COLOR": "1"}], ids=str
)
def test_every_screen_by_its_key_in_tmux_and_back_to_the_shell(tmp_path, variables):
    finished_run(tmp_path / "runs")
    environment = ENVIRONMENT | {
        "XDG_STATE_HOME": str(tmp_path / "state"), "XDG_CONFIG_HOME": str(tmp_path / "config"),
    }  # fmt: skip

    def tmux(*arguments: str) -> str:
        command = ["tmux", "-S", str(tmp_path / "tmux"), "-f", "/dev/null", *arguments]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        return done.stdout

    def shows(words: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while words not in tmux("capture-pane", "-p"):
            assert time.monotonic() < deadline, tmux("capture-pane", "-p")
            time.sleep(0.1)

    def fits() -> None:
        lines = tmux("capture-pane", "-p").splitlines()
        assert len(lines) <= 24
        assert all(len(line) <= 80 for line in lines)

    try:
        tmux("new-session", "-d", "-x", "80", "-y", "24", "sh")
        tmux("send-keys", "PS1='SHELL''> '", "Enter")
        shows("SHELL>")
        words = " ".join(f"{name}={value}" for name, value in variables.items())
        tmux("send-keys", f"{words} {sys.executable} -m app", "Enter")
        shows("1 JOBS")
        shows("fish")
        for key, title in SCREENS.items():
            tmux("send-keys", key)
            shows(title)
            fits()
        tmux("send-keys", "q")
        shows("SHELL>")
        tmux("send-keys", "echo back$((1+1))", "Enter")
        shows("back2")
        assert "JOBS" not in tmux("capture-pane", "-p")
        assert tmux("display-message", "-p", "#{alternate_on}#{mouse_any_flag}").strip() == "00"
    finally:
        tmux("kill-server")
