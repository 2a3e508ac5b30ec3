"""The end of a run is told to an address; figures go into a CSV file."""

from __future__ import annotations

import csv
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from app_runs import wait_for

from app.runs.export import figures_csv
from app.runs.state import read_state
from app.runs.webhook import send, tell_end
from trainer.contract.config import LoggingSection
from trainer.contract.events import EventWriter
from trainer.contract.run_dir import RunDir
from trainer.contract.webhook import address_of


@pytest.fixture
def listener() -> Iterator[SimpleNamespace]:
    """Return a server with the bodies that it got, and the codes that it answers in turn."""
    found = SimpleNamespace(bodies=[], codes=[])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.bodies.append(json.loads(body))
            self.send_response(found.codes.pop(0) if found.codes else 204)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    found.address = f"http://127.0.0.1:{server.server_port}/secret"
    yield found
    server.shutdown()
    server.server_close()


def asking(run: RunDir, webhook: str, more: str = "") -> None:
    run.root.mkdir(parents=True, exist_ok=True)
    run.config.write_text(f'[logging]\nwebhook = "{webhook}"\n{more}', encoding="utf-8")


@pytest.mark.parametrize(
    ("mode", "told"), [("finish", "done at step 5 of 5"), ("fail", "the loss is not a number")]
)
def test_the_supervisor_tells_the_end(runs, listener, mode, told):
    runs.config_text = f'[logging]\nwebhook = "{listener.address}"\n'
    run = runs.start(mode)
    wait_for(lambda: listener.bodies)
    (body,) = listener.bodies
    assert body["run"] == "run"
    assert told in body["text"]
    assert body["text"] == body["content"]
    assert body["state"] == read_state(run).state.value


def test_only_wanted_ends_are_told(runs, listener, tmp_path):
    run = runs.start("finish")
    wait_for(lambda: not read_state(run).state.is_live)
    asking(run, listener.address, 'webhook_on = ["failed"]\n')
    assert tell_end(run) == ""
    assert not listener.bodies
    asking(run, listener.address, 'webhook_on = ["done"]\n')
    assert tell_end(run) == ""
    assert len(listener.bodies) == 1
    run.config.write_text("[logging]\n")
    assert tell_end(run) == ""
    assert len(listener.bodies) == 1


def test_what_goes_wrong_is_told_without_the_address(listener, monkeypatch):
    listener.codes = [404]
    assert send(listener.address, {}) == "it answered 404 Not Found"
    listener.codes = [503, 503]
    assert send(listener.address, {}) == ""  # the third time
    assert len(listener.bodies) == 4
    problem = send("http://127.0.0.1:9/secret", {})
    assert "cannot be reached" in problem
    assert "secret" not in problem
    monkeypatch.delenv("MY_HOOK", raising=False)
    assert send("env:MY_HOOK", {}) == "env:MY_HOOK holds no address"
    monkeypatch.setenv("MY_HOOK", listener.address)
    assert send("env:MY_HOOK", {}) == ""


@pytest.mark.parametrize(
    "value", ["ftp://x/y", "file:///etc/passwd", "env:", "nonsense", "https://"]
)
def test_other_addresses_are_refused(value):
    assert address_of(value, {}) is None
    with pytest.raises(ValueError, match="https://"):
        LoggingSection(webhook=value)


def test_notify_tells_now(menma, listener, tmp_path):
    run = RunDir(tmp_path / "runs" / "fish")
    EventWriter(run.events)("end", reason="done", step=3)
    assert "names no logging.webhook" in menma("runs", "notify", "fish").err
    asking(run, listener.address)
    assert menma("runs", "notify", "fish").code == 0
    assert listener.bodies[0]["state"] == "done"
    listener.codes = [404]
    answer = menma("runs", "notify", "fish")
    assert (answer.code, "404" in answer.err) == (2, True)


def test_csv_has_each_step_once(menma, tmp_path):
    run = RunDir(tmp_path / "runs" / "fish")
    emit = EventWriter(run.events)
    for step, loss in ((1, 0.5), (2, 0.4), (3, 0.3)):
        emit("step", step=step, total_steps=4, loss=loss, terms={"loss": loss})
    for step, loss in ((2, 0.45), (4, 0.2)):  # resumed from step 1
        emit("step", step=step, total_steps=4, loss=loss)
    emit("validation", step=4, loss=0.125, by_timestep={"500": 0.25})
    rows = list(csv.DictReader(io.StringIO(figures_csv(run))))
    assert [(row["step"], row["train/loss"]) for row in rows] == [
        ("1", "0.5"), ("2", "0.45"), ("4", "0.2"),
    ]  # fmt: skip
    assert rows[0]["train/terms/loss"] == "0.5"
    assert rows[2]["validation/timestep_500"] == "0.25"
    assert menma("runs", "csv", "fish").out == figures_csv(run)
    target = tmp_path / "figures.csv"
    assert menma("runs", "csv", "fish", "-o", target).code == 0
    assert target.read_text() == figures_csv(run)
