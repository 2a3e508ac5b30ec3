"""GPUs as nvidia-smi tells of them, RAM as psutil does, and both as meters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from app.domain.environment import gpus
from app.domain.load import GIB, GpuLoad, Load, read_load
from app.render.bar import bar
from app.render.load import gpu_lines, ram_line
from app.runs.processes import ProcessId, boot_id, host_name
from app.runs.status import Status
from app.tui.live import interval_s
from trainer.contract.run_dir import RunDir

ROWS = """\
0, GPU-aaaa, 14643, 24576, 97, 68, 412.30
1, GPU-bbbb, 12, 24576, 0, [N/A], [Not Supported]
"""


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Return a writer of the `nvidia-smi` that is found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def write(answer, code=0):
        (folder / "answer").write_text(answer)
        script = folder / "nvidia-smi"
        script.write_text(
            f'#!/bin/sh\nwhile read -r line; do echo "$line"; done < {folder}/answer\nexit {code}\n'
        )
        script.chmod(0o755)

    return write


def a_run(tmp_path, visible=None, **changes):
    run = RunDir(tmp_path / "run")
    me = ProcessId.of(os.getpid())
    values = {"boot_id": boot_id(), "host": host_name(), "started": time.time(), "trainer": me}
    Status(supervisor=me, **(values | changes)).write(run)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    run.command.write_text(json.dumps({"argv": [], "cwd": "/", "env": environment}))
    return run


def test_gpus_are_read_and_what_the_driver_does_not_tell_is_none(smi):
    smi(ROWS)
    load = read_load()
    assert load.gpus[0] == GpuLoad("0", 14643 / 1024, 24.0, 97.0, 68.0, 412.3)
    assert load.gpus[1] == GpuLoad("1", 12 / 1024, 24.0, 0.0, None, None)
    assert load.run_gib is None


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("1", ["1"]), ("GPU-aaaa", ["0"]), ("7", ["0", "1"]), (None, ["0", "1"])],
)
def test_a_run_shows_the_gpus_that_it_sees(smi, tmp_path, visible, expected):
    smi(ROWS)
    load = read_load(a_run(tmp_path, visible))
    assert [gpu.index for gpu in load.gpus] == expected


@pytest.mark.parametrize("visible", ["", "-1"])
def test_a_run_without_a_gpu_says_so(smi, tmp_path, visible):
    smi(ROWS)
    assert read_load(a_run(tmp_path, visible)).no_gpu == "the run was started without one"


def test_no_driver_a_broken_one_and_nonsense_are_words(smi, monkeypatch):
    assert read_load().no_gpu == "no NVIDIA driver was found (nvidia-smi)"
    smi("Failed to initialize NVML\n", code=9)
    assert read_load().no_gpu == "nvidia-smi fails: Failed to initialize NVML"
    assert gpus() == []
    smi("one, two\n\n")
    assert read_load().no_gpu == "the driver lists none"

    def hangs(*arguments, **options):
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert read_load().no_gpu == "nvidia-smi gives no answer in 20 s"


def test_memory_of_the_run_is_that_of_its_processes(tmp_path):
    hold = "import sys; held = bytearray(64 * 2**20); print(flush=True); sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        child.stdout.readline()
        load = read_load(a_run(tmp_path))
        own = psutil.Process().memory_info().rss / GIB
        assert load.run_gib >= own + 64 / 1024 - 0.01
        assert 0 < load.ram_used_gib < load.ram_total_gib
    finally:
        child.communicate()


def test_a_run_on_another_machine_is_said_to_be_there(tmp_path):
    run = a_run(tmp_path, boot_id="another", host="gpu-box")
    load = read_load(run)
    assert (load.elsewhere, load.run_gib) == ("gpu-box", None)
    assert "the run is on gpu-box" in ram_line(load)


def test_a_trainer_that_is_gone_has_no_memory(tmp_path):
    assert read_load(a_run(tmp_path, trainer=ProcessId(os.getpid(), 1.0))).run_gib is None
    assert read_load(RunDir(tmp_path / "none")).run_gib is None


def a_load(num_gpus):
    gpu = [GpuLoad(str(n), 14.3, 24.0, 97.0, 68.0, None) for n in range(num_gpus)]
    return Load(tuple(gpu), "why" if not num_gpus else "", 16.0, 64.0, 6.25)


def test_meters_are_bars_and_many_gpus_fit_into_a_line():
    assert ram_line(a_load(1)) == "RAM   #####...............  16.0/64.0 GiB  run 6.2 GiB"
    assert gpu_lines(a_load(1), 76, 1) == [
        "GPU 0 ############........  14.3/24.0 GiB  97 % busy  68 C"
    ]
    assert gpu_lines(a_load(0), 76, 1) == ["GPU   none: why"]
    assert len(gpu_lines(a_load(8), 76, 8)) == 8
    (line,) = gpu_lines(a_load(8), 76, 1)
    assert len(line) <= 76
    assert line.endswith("+5 more")
    unknown = Load((GpuLoad("0", None, None, None, None, None),), "", 1.0, 0.0)
    assert gpu_lines(unknown, 76, 1)[0].rstrip() == "GPU 0 memory not told"
    assert (bar(-1, 4), bar(0.5, 4), bar(2, 4)) == ("....", "##..", "####")


def test_screens_look_less_often_over_ssh_in_large_windows():
    far = {"SSH_CONNECTION": "1.2.3.4"}
    assert interval_s(None, 80 * 24, {}) == 1.0
    assert interval_s(None, 200 * 50, {}) == 1.0
    assert interval_s(None, 80 * 24, far) == 1.0
    assert interval_s(None, 200 * 50, far) == 2.0
    assert interval_s(4.0, 200 * 50, far) == 0.25
