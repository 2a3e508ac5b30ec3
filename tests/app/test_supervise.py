"""What is killed, what goes on, and what people are told about it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from app_runs import ENVIRONMENT, wait_for

from app.runs import control, launch, lock
from app.runs.control import Urgency
from app.runs.processes import ProcessId, start_time
from app.runs.state import State, read_state
from app.runs.status import read_status
from trainer.contract.errors import BusyError, RunError
from trainer.contract.run_dir import RunDir

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and sessions of POSIX")


def state_of(run):
    return read_state(run).state


def stepped(run, num=2):
    return lambda: (read_state(run).step or 0) >= num


def events(run):
    return [json.loads(line) for line in run.events.read_text().splitlines()]


def test_a_run_goes_from_start_to_done(runs):
    run = runs.start("finish")
    assert state_of(run).is_live
    wait_for(lambda: not state_of(run).is_live)
    found = read_state(run)
    assert (found.state, found.step, found.total_steps) == (State.DONE, 5, 5)
    status = read_status(run)
    assert (status.exit_code, status.signal, status.reason) == (0, None, "")
    assert status.started < status.ended
    assert not lock.is_held(run.lock)
    assert "a word for the console" in run.console.read_text()


def test_the_supervisor_and_the_trainer_are_not_in_our_session(runs):
    run = runs.start("steps")
    wait_for(stepped(run))
    status = read_status(run)
    assert os.getsid(status.supervisor.pid) == status.supervisor.pid
    assert os.getsid(status.trainer.pid) == status.supervisor.pid
    assert os.getpgid(status.trainer.pid) == status.trainer.pid


def test_kill_9_of_the_trainer_is_a_failure_with_its_signal(runs):
    run = runs.start("steps")
    wait_for(stepped(run))
    os.kill(read_status(run).trainer.pid, signal.SIGKILL)
    wait_for(lambda: not state_of(run).is_live)
    found = read_state(run)
    assert found.state is State.FAILED
    assert "signal 9" in found.why
    assert "memory" in found.why
    assert (read_status(run).signal, read_status(run).exit_code) == (9, None)


def test_a_failure_says_what_the_trainer_said(runs):
    run = runs.start("fail")
    wait_for(lambda: not state_of(run).is_live)
    assert read_state(run).state is State.FAILED
    assert read_state(run).why == "the loss is not a number"
    assert read_status(run).exit_code == 1


def test_kill_9_of_the_supervisor_leaves_an_orphan_that_can_be_stopped(runs):
    run = runs.start("child")
    wait_for(stepped(run))
    status = read_status(run)
    os.kill(status.supervisor.pid, signal.SIGKILL)
    wait_for(lambda: state_of(run) is State.ORPHANED)
    # Neither the trainer nor what it forked keeps the lock that died with the supervisor.
    assert status.trainer.is_alive()
    assert not lock.is_held(run.lock)
    step = read_state(run).step
    wait_for(stepped(run, step + 3))
    with pytest.raises(BusyError, match="without a supervisor"):
        launch.claim(run)
    control.stop(run, Urgency.SAVE)
    wait_for(lambda: not state_of(run).is_live)
    assert state_of(run) is State.STOPPED
    assert events(run)[-1]["reason"] == "stopped"


def test_an_orphan_can_be_ended_now(runs):
    run = runs.start("stuck")
    wait_for(stepped(run))
    status = read_status(run)
    os.kill(status.supervisor.pid, signal.SIGKILL)
    wait_for(lambda: state_of(run) is State.ORPHANED)
    control.stop(run, Urgency.NOW, grace_s=0.5)
    assert not status.trainer.is_alive()


def test_an_orphan_that_finishes_is_done(runs):
    run = runs.start("held")
    wait_for(stepped(run, 1))
    os.kill(read_status(run).supervisor.pid, signal.SIGKILL)
    wait_for(lambda: state_of(run) is State.ORPHANED)
    (run.root / "go").touch()
    wait_for(lambda: not state_of(run).is_live)
    assert state_of(run) is State.DONE


def test_kill_9_of_both_is_a_failure(runs):
    run = runs.start("steps")
    wait_for(stepped(run))
    status = read_status(run)
    os.kill(status.supervisor.pid, signal.SIGKILL)
    os.kill(status.trainer.pid, signal.SIGKILL)
    wait_for(lambda: not state_of(run).is_live)
    assert read_state(run).state is State.FAILED
    assert "both killed" in read_state(run).why


def test_stop_saves_and_ends(runs):
    run = runs.start("steps")
    wait_for(stepped(run))
    control.stop(run, Urgency.SAVE)
    wait_for(lambda: not state_of(run).is_live)
    found = read_state(run)
    assert (found.state, found.why) == (State.STOPPED, "")
    kinds = [event["type"] for event in events(run)]
    assert kinds[-2:] == ["checkpoint", "end"]
    assert [path.suffix for path in run.control.iterdir()] == [".done"]


def test_a_stop_while_loading_does_not_wait_for_a_step(runs):
    run = runs.start("loading")
    wait_for(lambda: read_status(run).trainer is not None)
    control.stop(run, Urgency.SAVE)
    wait_for(lambda: not state_of(run).is_live, timeout_s=60)
    found = read_state(run)
    assert (found.state, found.why) == (State.STOPPED, "ended without saving")
    assert [path.suffix for path in run.control.iterdir()] == [".err"]


def test_a_stop_that_is_not_heard_shows_as_stopping_and_now_kills_after_its_grace(runs):
    supervisor = runs.supervise("stuck", "--grace-s", "0.5")
    run = runs.started[0]
    wait_for(stepped(run))
    control.stop(run, Urgency.SAVE)
    assert state_of(run) is State.STOPPING
    time.sleep(1)
    assert state_of(run) is State.STOPPING
    control.stop(run, Urgency.NOW)
    assert supervisor.wait(timeout=120) == 128 + 9
    assert state_of(run) is State.STOPPED
    assert read_state(run).why == "ended without saving"


def test_now_ends_without_saving(runs):
    run = runs.start("steps")
    wait_for(stepped(run))
    control.stop(run, Urgency.NOW)
    wait_for(lambda: not state_of(run).is_live)
    assert state_of(run) is State.STOPPED


def test_kill_leaves_no_process_of_the_group(runs):
    run = runs.start("child")
    wait_for(lambda: (run.root / "child.pid").exists() and stepped(run)())
    child = ProcessId.of(int((run.root / "child.pid").read_text()))
    control.stop(run, Urgency.KILL)
    wait_for(lambda: not state_of(run).is_live)
    wait_for(lambda: not child.is_alive(), timeout_s=60)


def test_a_trainer_that_dies_takes_its_processes_along(runs):
    run = runs.start("child")
    wait_for(lambda: (run.root / "child.pid").exists() and stepped(run)())
    child = ProcessId.of(int((run.root / "child.pid").read_text()))
    os.kill(read_status(run).trainer.pid, signal.SIGKILL)
    wait_for(lambda: not state_of(run).is_live)
    wait_for(lambda: not child.is_alive(), timeout_s=60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_supervisor_saves_and_ends(runs, number):
    supervisor = runs.supervise("steps")
    run = runs.started[0]
    wait_for(stepped(run))
    supervisor.send_signal(number)
    assert supervisor.wait(timeout=120) == 130
    assert state_of(run) is State.STOPPED
    assert "checkpoint" in {event["type"] for event in events(run)}


def test_three_signals_to_the_supervisor_kill(runs):
    supervisor = runs.supervise("heard", "--grace-s", "600")
    run = runs.started[0]
    heard = run.root / "heard"
    wait_for(stepped(run))
    supervisor.send_signal(signal.SIGTERM)
    wait_for(lambda: state_of(run) is State.STOPPING)
    supervisor.send_signal(signal.SIGTERM)
    wait_for(heard.exists)  # the second was passed on: a third before that would be lost
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(timeout=120) == 128 + 9


def test_hanging_up_changes_nothing(runs):
    supervisor = runs.supervise("steps")
    run = runs.started[0]
    wait_for(stepped(run))
    supervisor.send_signal(signal.SIGHUP)
    os.kill(read_status(run).trainer.pid, signal.SIGHUP)
    step = read_state(run).step
    wait_for(stepped(run, step + 3))
    assert state_of(run) is State.RUNNING


def test_a_second_start_is_busy(runs):
    run = runs.start("steps")
    with pytest.raises(BusyError, match="right now") as caught:
        launch.claim(run)
    assert "menma runs watch run" in caught.value.hint
    second = subprocess.run(
        [sys.executable, "-m", "app.runs.supervise", str(run.root), "--", "true"],
        capture_output=True,
        check=False,
        env=ENVIRONMENT,
    )
    assert second.returncode == 3
    assert state_of(run).is_live


def test_of_many_starts_at_once_one_wins(runs):
    script = (
        "import sys; from pathlib import Path\n"
        "from app_runs import Runs; from trainer.contract.errors import BusyError\n"
        "try: Runs(Path(sys.argv[1])).start('steps')\n"
        "except BusyError: sys.exit(3)\n"
    )
    command = [sys.executable, "-c", script, str(runs.folder)]
    started = [subprocess.Popen(command, env=ENVIRONMENT) for _ in range(4)]
    codes = sorted(process.wait(timeout=120) for process in started)
    runs.started.append(RunDir(runs.folder / "run"))
    assert codes == [0, 3, 3, 3]


def test_a_run_can_be_started_again_and_old_requests_do_not_stop_it(runs):
    run = runs.start("finish")
    wait_for(lambda: not state_of(run).is_live)
    first = read_status(run)
    run.request("stop")
    runs.start("steps")
    wait_for(stepped(run, 6))
    assert state_of(run) is State.RUNNING
    assert read_status(run).started > first.ended
    assert [path.suffix for path in run.control.iterdir()] == [".err"]


def test_a_trainer_that_cannot_be_started_is_a_failure(runs):
    run = RunDir(runs.folder / "run")
    runs.started.append(run)
    launch.start(run, launch.claim(run), ["/no/such/program"])
    wait_for(lambda: not state_of(run).is_live)
    assert state_of(run) is State.FAILED
    assert "could not be started" in read_state(run).why


def test_a_supervisor_that_does_not_start_is_told_with_what_it_said(runs, monkeypatch):
    run = RunDir(runs.folder / "run")
    held = launch.claim(run)
    # A package of the same name that cannot be imported stands before the installed one.
    broken = runs.folder / "broken" / "app"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("import nothing_of_that_name\n")
    environment = {"PYTHONPATH": str(broken.parent)}
    monkeypatch.setattr(launch, "child_environment", lambda: environment)
    monkeypatch.chdir("/")
    with pytest.raises(RunError, match="No module named"):
        launch.start(run, held, ["true"])


def test_start_time_tells_a_process_from_a_zombie():
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    wait_for(lambda: start_time(process.pid) is None)
    process.wait()
    assert start_time(os.getpid()) is not None
