"""What is loaded when, seen from outside: import-linter reads source, this runs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "transformers", "deepspeed", "safetensors", "av", "PIL", "textual")
JOBS = "from trainer.contract.jobs import JOBS; [JOBS.load(name) for name in JOBS.names]"


def modules_after(statement: str) -> set[str]:
    """Return the top-level packages that a fresh interpreter holds after `statement`."""
    script = (
        f"{statement}\nimport sys\nprint(*sorted({{n.partition('.')[0] for n in sys.modules}}))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return set(answer.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "trainer.contract.config_io",
        "trainer.contract.dataset_config",
        "trainer.contract.jobs",
        "trainer.contract.run_dir",
        "trainer.contract.events",
        "app.cli.main",
    ],
)
def test_nothing_heavy_is_loaded(module):
    assert not modules_after(f"import {module}") & set(HEAVY)


@pytest.mark.parametrize("module", ["trainer.jobs.frames", "trainer.data.captions"])
def test_looking_at_clips_and_captions_does_not_wait_for_torch(module):
    assert "torch" not in modules_after(f"import {module}")


@pytest.mark.parametrize("module", ["trainer.contract.run_dir", "trainer.contract.events"])
def test_what_reads_a_run_needs_the_standard_library_only(module):
    assert "pydantic" not in modules_after(f"import {module}")


def test_a_heavy_import_would_be_seen():
    assert "numpy" in modules_after("import numpy")


def test_jobs_load_no_more_than_torch_before_they_begin():
    """DeepSpeed is for whoever trains with it, transformers for who reads text, and the compiler
    of torch, a second by itself, for who compiles."""
    compiler = "assert 'torch' in sys.modules and 'torch._dynamo' not in sys.modules"
    assert not modules_after(f"{JOBS}; import sys; {compiler}") & {"deepspeed", "transformers"}


def test_jobs_load_where_there_is_no_unix():
    """On Windows these modules of the standard library do not exist."""
    missing = ("fcntl", "resource", "termios", "pwd", "grp")
    # None in its place makes an import fail. torch and its company may have looked before.
    hide = f"import torch, psutil, sys; sys.modules.update(dict.fromkeys({missing!r}))"
    loaded = modules_after(f"{hide}; {JOBS}")
    assert {"trainer", "safetensors"} <= loaded
