"""`menma train` and `menma runs` with real processes: Ctrl-C, closed terminals, a second start."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from app_runs import ENVIRONMENT, Runs, fake_command, wait_for
from terminals import Terminal

from app.runs import child, launch
from app.runs.processes import ProcessId
from app.runs.state import State, read_state
from app.runs.status import read_status
from trainer.contract.run_dir import RunDir

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and terminals of POSIX")
DRIVER = Path(__file__).with_name("cli_driver.py")


@pytest.fixture
def run(tmp_path, config):
    """Return the run that `config` makes; whatever lives in it is killed at the end."""
    runs = Runs(tmp_path / "runs")
    run = RunDir(tmp_path / "runs" / "fish")
    runs.started.append(run)
    yield run
    runs.end_all()


def menma_process(mode, *arguments, **options):
    command = [sys.executable, str(DRIVER), mode, *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, text=True, env=ENVIRONMENT, **options
    )


def menma_answer(mode, *arguments, cwd):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = menma_process(mode, *arguments, cwd=cwd, **pipes)
    out, err = process.communicate(timeout=90)
    return process.returncode, out, err


def read_until(stream, words):
    """Read lines until one has the words; return them all."""
    said = []
    while words not in "".join(said[-1:]):
        said.append(stream.readline())
        assert said[-1], f"{words!r} was not said:\n{''.join(said)}"
    return "".join(said)


def stepped(run, num=2):
    return lambda: (read_state(run).step or 0) >= num


def test_a_run_is_shown_to_its_end_and_the_output_is_the_data(run, config, tmp_path):
    code, out, err = menma_answer("finish", "train", config, cwd=tmp_path)
    assert code == 0
    assert out == f"{run.output / 'fish.safetensors'}\n"
    assert "step 5/5" in err
    assert "Done at step 5" in err
    assert "menma sample" in err


def test_events_come_as_json_lines(run, config, tmp_path):
    code, out, _ = menma_answer("finish", "train", config, "--json", cwd=tmp_path)
    lines = out.splitlines()
    assert code == 0
    assert [json.loads(line)["type"] for line in lines[:-1]] == ["step"] * 5 + ["end"]


def test_ctrl_c_once_saves_and_ends_with_130(run, config, tmp_path):
    process = menma_process("steps", "train", config, cwd=tmp_path, stderr=subprocess.PIPE)
    wait_for(stepped(run))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Ctrl-C again ends now" in err
    assert "checkpoint at step" in err
    assert read_state(run).state is State.STOPPED


def test_ctrl_c_three_times_kills(run, config, tmp_path):
    process = menma_process("stuck", "train", config, cwd=tmp_path, stderr=subprocess.PIPE)
    wait_for(stepped(run))
    # One after the other: of two signals that find the process waiting, it gets one.
    process.send_signal(signal.SIGINT)
    read_until(process.stderr, "Ctrl-C again ends now")
    process.send_signal(signal.SIGINT)
    read_until(process.stderr, "Ending now.")
    status = read_status(run)
    os.kill(status.supervisor.pid, signal.SIGSTOP)  # whose grace period kills, too
    try:
        process.send_signal(signal.SIGINT)
        read_until(process.stderr, "Killed.")
        wait_for(lambda: not status.trainer.is_alive())
    finally:
        os.kill(status.supervisor.pid, signal.SIGCONT)
    process.communicate(timeout=120)
    assert process.returncode == 130


def test_ctrl_c_while_the_run_begins_ends_the_run_too(run, config, menma, monkeypatch):
    monkeypatch.setattr(child, "TRAINER", tuple(fake_command("steps")))
    start = launch.start

    def interrupted(*arguments, **options):
        start(*arguments, **options)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(launch, "start", interrupted)
    code, _, err = menma("train", config)
    assert code == 130
    assert "Ctrl-C again ends now" in err
    assert read_state(run).state is State.STOPPED


def test_a_failure_is_shown_and_its_exit_code_passed_on(run, config, tmp_path):
    code, out, err = menma_answer("fail", "train", config, cwd=tmp_path)
    assert (code, out) == (1, "")
    assert err.count("error: the loss is not a number") == 1
    assert "look at step 3" in err
    assert "console.log" in err


def test_a_killed_trainer_is_told_with_its_last_words(run, config, tmp_path):
    process = menma_process("steps", "train", config, cwd=tmp_path, stderr=subprocess.PIPE)
    wait_for(stepped(run))
    os.kill(read_status(run).trainer.pid, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "signal 9" in err
    assert "a word for the console" in err


def test_detached_it_goes_on_and_everything_works_from_elsewhere(run, config, tmp_path):
    code, out, err = menma_answer("steps", "train", config, "--detach", cwd=tmp_path)
    assert (code, out) == (0, f"{Path('runs/fish')}\n")
    assert "menma runs watch runs/fish" in err
    wait_for(stepped(run))

    code, _, err = menma_answer("steps", "train", config, cwd=tmp_path)
    assert code == 3
    assert "is being trained right now" in err

    _, out, _ = menma_answer("-", "runs", "list", "--json", cwd=tmp_path)
    (found,) = json.loads(out)
    assert (found["name"], found["state"], found["live"]) == ("fish", "running", True)
    _, out, _ = menma_answer("-", "runs", "show", "fish", cwd=tmp_path)
    assert "running" in out
    code, _, err = menma_answer("-", "runs", "save", "fish", cwd=tmp_path)
    assert code == 0
    assert "save done" in err
    assert menma_answer("-", "runs", "sample", "runs/fish", cwd=tmp_path)[0] == 0
    code, _, err = menma_answer("-", "runs", "stop", "fish", cwd=tmp_path)
    assert code == 0
    assert "stopped" in err
    code, _, err = menma_answer("-", "runs", "save", "fish", cwd=tmp_path)
    assert code == 2
    assert "is not training" in err
    assert menma_answer("-", "runs", "stop", "fish", cwd=tmp_path)[0] == 0


def test_leaving_a_watched_run_does_not_stop_it(run, config, tmp_path):
    menma_answer("steps", "train", config, "--detach", cwd=tmp_path)
    pipes = {"stderr": subprocess.PIPE}
    process = menma_process("-", "runs", "watch", "fish", cwd=tmp_path, **pipes)
    read_until(process.stderr, "step ")  # it watches: Ctrl-C is not its start's
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "The run goes on" in err
    assert read_state(run).state is State.RUNNING


def test_closing_the_terminal_leaves_the_run_alone(run, config, tmp_path):
    terminal = Terminal(
        [sys.executable, str(DRIVER), "steps", "train", str(config)],
        cwd=tmp_path,
        environment=ENVIRONMENT | {"TERM": "xterm-256color"},
    )
    try:
        wait_for(stepped(run))
        wait_for(lambda: "step " in terminal.output)  # it watches: the closing is not its start
        terminal.close()
        assert terminal.process.wait(timeout=90) != 0
        step = read_state(run).step
        wait_for(stepped(run, step + 5))
        assert read_state(run).state is State.RUNNING
    finally:
        terminal.end()


def test_on_a_terminal_of_80_columns_a_bar_is_drawn_that_fits(run, config, tmp_path):
    terminal, inner = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(DRIVER), "finish", "train", str(config)],
        stdin=subprocess.DEVNULL,
        stdout=inner,
        stderr=inner,
        cwd=tmp_path,
        env=ENVIRONMENT | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"},
    )
    os.close(inner)
    screen = b""
    with suppress(OSError):  # Linux answers EIO when the other side is gone
        while piece := os.read(terminal, 65536):
            screen += piece
    os.close(terminal)
    assert process.wait(timeout=120) == 0
    text = screen.decode()
    assert "━" in text
    assert "step 5/5" in text
    assert "\x1b[?25h" in text  # the cursor is back


def test_a_finished_run_is_not_started_again(run, config, tmp_path):
    assert menma_answer("finish", "train", config, cwd=tmp_path)[0] == 0
    ended = read_status(run).ended
    code, _, err = menma_answer("finish", "train", config, cwd=tmp_path)
    assert code == 0
    assert "is finished (step 5)" in err
    assert read_status(run).ended == ended

    longer = ("--set", "training.max_steps=9")
    code, _, err = menma_answer("finish", "train", config, *longer, cwd=tmp_path)
    assert code == 0
    assert "training.max_steps: 5 -> 9" in err
    assert read_status(run).ended > ended


def test_resume_never_keeps_the_earlier_run(run, config, tmp_path):
    menma_answer("finish", "train", config, cwd=tmp_path)
    code, _, err = menma_answer("finish", "train", config, "--resume", "never", cwd=tmp_path)
    assert code == 0
    assert "fish.1" in err
    assert (run.root.with_name("fish.1") / "output" / "fish.safetensors").exists()
    assert json.loads((run.root / "request.json").read_text())["resume"] == "never"


def test_resume_from_a_checkpoint_that_is_not_there_is_a_mistake(run, config, tmp_path):
    code, _, err = menma_answer("finish", "train", config, "--resume", "no/where", cwd=tmp_path)
    assert code == 2
    assert "no such checkpoint: no/where" in err
    assert not run.root.exists()


def test_gpus_and_settings_reach_the_trainer(run, config, tmp_path):
    arguments = ("--gpus", "2", "--set", "distributed.zero_stage=1", "--detach")
    code, _, _ = menma_answer("finish", "train", config, *arguments, cwd=tmp_path)
    assert code == 0
    assert "num_processes = 2" in run.config.read_text()
    assert "zero_stage = 1" in run.config.read_text()
    assert json.loads((run.root / "request.json").read_text())["set"] == [
        "distributed.zero_stage=1", "distributed.num_processes=2"
    ]  # fmt: skip


def test_a_hostfile_reaches_the_trainer(run, config, tmp_path):
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    arguments = ("--hostfile", "hosts", "--detach")
    code, _, err = menma_answer("finish", "train", config, *arguments, cwd=tmp_path)
    assert code == 0, err
    assert f'hostfile = "{tmp_path}/hosts"' in run.config.read_text()
    assert json.loads((run.root / "request.json").read_text())["set"] == [
        f'distributed.hostfile="{tmp_path}/hosts"'
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--hostfile", "hosts", "--gpus", "2"), "distributed.num_processes: the hostfile says"),
        (("--hostfile", "nowhere"), "distributed.hostfile: no such file"),
        (("--hostfile", "unequal"), "distributed.hostfile: the machines run unequal numbers"),
        (("--hostfile", "wrong"), "wrong:2: slots is 'two'"),
    ],
)
def test_a_hostfile_that_does_not_do_makes_no_run(run, config, tmp_path, options, words):
    (tmp_path / "hosts").write_text("node1 slots=2\n")
    (tmp_path / "unequal").write_text("node1 slots=2\nnode2 slots=1\n")
    (tmp_path / "wrong").write_text("node1 slots=2\nnode2 slots=two\n")
    code, _, err = menma_answer("finish", "train", config, *options, cwd=tmp_path)
    assert code == 2
    assert words in err
    assert not run.root.exists()


def test_a_config_that_is_wrong_makes_no_run(run, config, tmp_path):
    code, _, err = menma_answer(
        "finish", "train", config, "--set", "training.seed=-1", cwd=tmp_path
    )
    assert code == 2
    assert "training.seed" in err
    assert not run.root.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_job_in_the_foreground_ends_with_its_command(config, tmp_path, number):
    pid_file = tmp_path / "job.pid"
    process = subprocess.Popen(
        [sys.executable, str(DRIVER), "-", "cache", str(config)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=ENVIRONMENT | {"FAKE_PID": str(pid_file), "FAKE_RECORD": str(tmp_path / "r.json")},
        start_new_session=True,
    )
    wait_for(lambda: pid_file.exists() and pid_file.read_text())
    job = ProcessId.of(int(pid_file.read_text()))
    if number == signal.SIGINT:  # Ctrl-C reaches both, a SIGTERM the command alone
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else 1)
    assert not job.is_alive()
