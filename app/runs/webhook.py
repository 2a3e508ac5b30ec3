"""Tells an address that a run has ended: one POST of JSON.

Called by the supervisor, who sees every end.

`text` is what Slack shows, `content` what Discord shows; the other keys are for programs.
"""

from __future__ import annotations

import json
import os
import tomllib
import urllib.error
import urllib.request
from typing import Any

from app.runs.durations import duration
from app.runs.processes import host_name
from app.runs.state import RunState, State, read_state
from trainer.contract.run_dir import RunDir
from trainer.contract.webhook import address_of

TIMEOUT_S = 10.0
TRIES = 3
DEFAULT_ENDS = ("done", "failed")
ENDS = {State.DONE: "done", State.STOPPED: "stopped", State.FAILED: "failed", State.LOST: "failed"}
"""State -> the word of `logging.webhook_on`."""


def tell_end(run: RunDir) -> str:
    """Tell the end of a run if its config asks for it; return what went wrong, empty: nothing.

    The address is not part of what is returned: it may be a secret.
    """
    wanted = wanted_address(run)
    if wanted is None:
        return ""
    state = read_state(run)
    if ENDS.get(state.state) not in _settings(run).get("webhook_on", DEFAULT_ENDS):
        return ""
    return send(wanted, message_of(state, run))


def wanted_address(run: RunDir) -> str | None:
    """Return the `logging.webhook` of the config that a run has started with."""
    wanted = _settings(run).get("webhook")
    return wanted if isinstance(wanted, str) else None


def send(wanted: str, content: dict[str, Any]) -> str:
    """POST `content` to what `logging.webhook` says; return what went wrong, empty: nothing."""
    address = address_of(wanted, os.environ)
    if address is None:
        return f"{wanted} holds no address" if wanted.startswith("env:") else "it is no address"
    request = urllib.request.Request(
        address,
        data=json.dumps(content).encode(),
        headers={"Content-Type": "application/json", "User-Agent": "menma"},
        method="POST",
    )
    problem = ""
    for _ in range(TRIES):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S):
                return ""
        except urllib.error.HTTPError as error:
            problem = f"it answered {error.code} {error.reason}"
            if error.code < 500:  # asking again will not change it
                break
        except (OSError, ValueError) as error:
            problem = f"it cannot be reached: {getattr(error, 'reason', type(error).__name__)}"
    return problem


def message_of(state: RunState, run: RunDir) -> dict[str, Any]:
    """Return what is told of a run."""
    words = f"{state.name}: {state.state.value}"
    if state.step is not None:
        words += f" at step {state.step}"
        words += f" of {state.total_steps}" if state.total_steps else ""
    seconds = state.ended - state.started if state.ended and state.started else None
    words += f" after {duration(seconds)}" if seconds else ""
    words += f", loss {state.loss:.4f}" if state.loss is not None else ""
    words += f"\n{state.why}" if state.why else ""
    return {
        "text": words,
        "content": words,
        "run": state.name,
        "state": state.state.value,
        "why": state.why,
        "step": state.step,
        "total_steps": state.total_steps,
        "loss": state.loss,
        "seconds": seconds,
        "host": host_name(),
        "path": str(run.root),
    }


def _settings(run: RunDir) -> dict[str, Any]:
    try:
        content = tomllib.loads(run.config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    section = content.get("logging", {})
    return section if isinstance(section, dict) else {}
