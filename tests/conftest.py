"""Settings that every test needs before torch starts."""

from __future__ import annotations

import gc
import os
import signal
import subprocess

# With other load on two cores, two torch threads are many times slower than one; and a float
# reduction's order, so a bit-for-bit comparison, depends on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

from tests.warm import start as warm
from trainer.engine.process_group import join, leave

# A slow machine is not a failing property. A change is judged by the same examples each time;
# `--hypothesis-profile search` draws other ones.
settings.register_profile("menma", deadline=None, max_examples=50, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=500)
settings.load_profile("menma")
torch.set_num_threads(1)

# Started in the background, a shell's child ignores Ctrl-C, and so would the commands under test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# And started by nohup, it outlives its terminal.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

MANY_OBJECTS = 100_000


@pytest.fixture(autouse=True)
def signals_stay():
    """Undo what a test's code did to this process's signals.

    A queue worker that runs in the test's own process ignores SIGHUP; each command that a later
    test started would inherit that, and outlive its terminal.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture
def warm_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes of this interpreter begin with everything imported, at any depth."""
    monkeypatch.setattr(subprocess, "Popen", warm.Popen)


@pytest.fixture
def world():
    """Return this process's place in a group of its own, which is made anew if a job left it.

    Not of the session: a job that runs in the test's process takes the group down at its end.
    """
    return join("cpu", timeout_s=60)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first, so that no worker is left with one when all others end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="module")
def collections_stay_quick():
    """Take what was imported and kept out of the collector's sight.

    Jobs collect garbage after each of their parts; among the millions of objects of this process,
    that is a second each time.
    """
    yield
    if len(gc.get_objects()) > MANY_OBJECTS:  # those in sight
        _freeze()


def _freeze() -> None:
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    _freeze()


def pytest_sessionfinish() -> None:
    leave()
