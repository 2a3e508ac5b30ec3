"""`Popen` and `run` for tests: the command of this checkout, started warm."""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from tests.warm import birth
from tests.warm.birth import ROOT

ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "OMP_NUM_THREADS": "1",
}
"""An environment in which the checkout is found from any folder."""
_PR_SET_CHILD_SUBREAPER = 36
_ONE_AT_A_TIME = threading.RLock()


class Popen(birth.Popen):
    """A child of this process that the nursery has forked."""

    begun_with = ENVIRONMENT

    def _fork(self, start: birth.Start) -> int:
        streams = tuple(
            number if stream < 0 else stream for number, stream in enumerate(start.streams)
        )
        return _nursery_pid(replace(start, streams=streams, folder=start.folder or str(Path.cwd())))

    @staticmethod
    def _start_of(given: Any) -> birth.Start | None:
        if sys.platform != "linux" or given["preexec_fn"] is not None or given["pass_fds"]:
            return None
        return birth.Popen._start_of(given)


def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[Any]:
    """Do what `subprocess.run` does."""
    with mock.patch.object(subprocess, "Popen", Popen):
        return subprocess.run(*arguments, **options)


def _nursery_pid(start: birth.Start) -> int:
    with _ONE_AT_A_TIME:
        channel = _nursery()
    content = asdict(start) | {"streams": (), "first": None}
    with _ONE_AT_A_TIME, _taking_orphans():
        socket.send_fds(channel, [json.dumps(content).encode()], list(start.streams))
        return int(channel.recv(64))


@cache
def _nursery() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-m", "tests.warm.nursery", str(theirs.fileno())]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=ENVIRONMENT,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    assert ours.recv(64) == b"ready", "the process that forks others did not come up"

    def close() -> None:
        ours.close()
        process.wait(timeout=60)

    atexit.register(close)
    return ours


@contextmanager
def _taking_orphans() -> Iterator[None]:
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)
