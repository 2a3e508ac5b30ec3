"""The state of a run as a function of lock, pids, boot, status, events and clock."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.runs import processes
from app.runs.follow import follow, tail_events
from app.runs.lock import RunLock, is_held
from app.runs.processes import ProcessId, boot_id, same_boot
from app.runs.state import State, find_runs, read_state
from app.runs.status import Status, read_status
from trainer.contract.errors import BusyError
from trainer.contract.events import EventWriter, encode
from trainer.contract.run_dir import RunDir

NOW = 2_000_000_000.0


def a_status(**changes) -> Status:
    me = ProcessId.of(os.getpid())
    values = {"supervisor": me, "trainer": me, "boot_id": boot_id(), "host": processes.host_name()}
    return Status(**(values | {"started": NOW - 1000} | changes))


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


@pytest.fixture
def held(run):
    lock = RunLock.acquire(run.lock)
    yield lock
    lock.release()


def event_line(kind, moment, **fields):
    return json.dumps({"v": 1, "time": moment, "type": kind, **fields}) + "\n"


def judge(run, status, *lines, now=NOW, boot=None):
    run.root.mkdir(parents=True, exist_ok=True)
    if status is not None:
        status.write(run)
    run.events.write_text("".join(lines), encoding="utf-8")
    found = read_state(run, now=now, boot=boot)
    return found.state, found.why


def test_a_held_lock_and_fresh_steps_are_running(run, held):
    lines = [event_line("step", NOW - 1, step=3, total_steps=9, step_time_s=2.0)]
    assert judge(run, a_status(), *lines) == (State.RUNNING, "")


def test_before_the_first_step_it_is_starting_and_says_what_it_does(run, held):
    assert judge(run, a_status(trainer=None)) == (State.STARTING, "")
    assert judge(run, None) == (State.STARTING, "")
    phase = event_line("phase", NOW - 1, name="load", detail="transformer")
    assert judge(run, a_status(), phase) == (State.STARTING, "load")


def test_steps_of_an_earlier_start_do_not_count(run, held):
    old = event_line("step", NOW - 5000, step=3, total_steps=9)
    assert judge(run, a_status(), old)[0] is State.STARTING


def test_a_clock_that_was_set_back_hides_nothing_of_this_start(run, held):
    old = event_line("step", NOW - 10, step=8, total_steps=9)
    status = a_status(started=NOW + 5000, events_from=len(old))
    assert judge(run, status, old)[0] is State.STARTING
    new = event_line("step", NOW - 5, step=3, total_steps=9)
    assert judge(run, status, old, new) == (State.RUNNING, "")
    assert judge(run, status, old, new, now=NOW - 9000) == (State.RUNNING, "")


def test_a_clock_that_was_set_back_hides_no_last_words(run):
    status = a_status(started=NOW + 5000, events_from=0, ended=NOW, exit_code=1)
    error = event_line("error", NOW - 4, message="disk full")
    assert judge(run, status, error) == (State.FAILED, "disk full")
    # The log was cut off since: times are all there is to go by.
    assert judge(run, replace(status, events_from=10**6), error) == (State.FAILED, "exit code 1")


@pytest.mark.parametrize(("num", "early"), [(1, True), (29, True), (30, False), (200, False)])
def test_before_thirty_steps_of_a_start_the_time_left_is_not_told(run, held, num, early):
    old = [event_line("step", NOW - 500, step=n, eta_s=9.0) for n in range(1, 60)]
    status = a_status(events_from=len("".join(old)))
    new = [event_line("step", NOW - 1, step=60 + n, eta_s=9.0) for n in range(num)]
    assert judge(run, status, *old, *new)[0] is State.RUNNING
    found = read_state(run, now=NOW)
    assert (found.estimating, found.eta_s) == (early, None if early else 9.0)


@pytest.mark.parametrize("value", ["x", [], {}, None, 1e999, "9" * 400])
def test_nonsense_in_an_event_is_left_out(run, held, value):
    shown = dict.fromkeys(("step", "total_steps", "loss", "eta_s", "step_time_s"), value)
    judge(run, a_status(), event_line("step", NOW - 1, **shown))
    found = read_state(run, now=NOW)
    assert found.state is State.RUNNING
    assert (found.step, found.total_steps, found.loss, found.eta_s) == (None, None, None, None)
    for moment in (value, 10**400):
        damaged = json.dumps({"type": "step", "time": moment, "step": 4}) + "\n"
        judge(run, a_status(events_from=0), damaged, event_line("step", NOW - 1, step=5))
        assert read_state(run, now=NOW).step == 5


@pytest.mark.parametrize(
    ("step_time_s", "silence_s", "state"),
    [
        (1.0, 299, State.RUNNING),
        (1.0, 301, State.STALLED),
        (60.0, 301, State.RUNNING),
        (60.0, 599, State.RUNNING),
        (60.0, 601, State.STALLED),
    ],
)
def test_silence_of_five_minutes_or_ten_steps_is_stalled(run, held, step_time_s, silence_s, state):
    line = event_line("step", NOW - silence_s, step=3, step_time_s=step_time_s)
    assert judge(run, a_status(), line)[0] is state


def test_a_request_to_stop_shows_until_the_end(run, held):
    line = event_line("step", NOW - 1, step=3, step_time_s=1.0)
    run.request("stop")
    assert judge(run, a_status(), line)[0] is State.STOPPING
    for path in run.control.iterdir():
        path.unlink()
    assert judge(run, a_status(), line)[0] is State.RUNNING
    assert judge(run, a_status(stop_asked=NOW - 60), line) == (State.STOPPING, "asked 1m00s ago")


def test_without_a_lock_and_with_a_living_trainer_it_is_orphaned(run):
    assert judge(run, a_status())[0] is State.ORPHANED


def test_a_pid_that_somebody_else_got_is_not_ours(run):
    me = ProcessId.of(os.getpid())
    reused = replace(me, start_time=me.start_time - 1)
    state, why = judge(run, a_status(trainer=reused, supervisor=reused))
    assert (state, why) == (State.FAILED, "trainer and supervisor were both killed")


def test_another_boot_is_lost_though_pid_and_start_time_are_the_same(run):
    state, why = judge(run, a_status(), boot="another boot")
    assert (state, why) == (State.LOST, "the machine was restarted")


def test_a_run_of_another_machine_says_its_name(run):
    _, why = judge(run, a_status(host="gpu-box"), boot="another boot")
    assert "gpu-box" in why


def test_what_was_done_before_the_restart_stays_done(run):
    end = event_line("end", NOW - 10, reason="done", step=9)
    assert judge(run, a_status(), end, boot="another boot") == (State.DONE, "")


@pytest.mark.parametrize(
    ("changes", "lines", "expected"),
    [
        ({"exit_code": 0}, [("end", {"reason": "done"})], (State.DONE, "")),
        ({"exit_code": 0}, [("end", {"reason": "stopped"})], (State.STOPPED, "")),
        ({"exit_code": 130}, [("end", {"reason": "stopped"})], (State.STOPPED, "")),
        ({"exit_code": 130}, [], (State.STOPPED, "ended without saving")),
        ({"signal": 9, "stop_asked": NOW - 60}, [], (State.STOPPED, "ended without saving")),
        ({"signal": 9, "reason": "killed"}, [], (State.FAILED, "killed")),
        ({"exit_code": 1}, [("error", {"message": "disk full"})], (State.FAILED, "disk full")),
        ({"exit_code": 7}, [], (State.FAILED, "exit code 7")),
    ],
)
def test_an_end_is_judged_by_exit_code_signal_and_last_words(run, changes, lines, expected):
    status = a_status(ended=NOW - 5, **changes)
    assert judge(run, status, *[event_line(k, NOW - 6, **f) for k, f in lines]) == expected


def test_a_folder_without_status_was_never_started(run):
    assert judge(run, None)[0] is State.FAILED
    assert judge(run, None, event_line("end", NOW, reason="done"))[0] is State.DONE


def test_a_new_supervisor_that_has_not_written_yet_is_starting(run, held):
    assert judge(run, a_status(ended=NOW - 5, exit_code=0))[0] is State.STARTING


def test_a_file_system_without_locks_is_judged_by_pids(run, monkeypatch):
    monkeypatch.setattr("app.runs.lock.is_held", lambda path: None)
    line = event_line("step", NOW - 1, step=3, step_time_s=1.0)
    assert judge(run, a_status(), line)[0] is State.RUNNING
    gone = ProcessId(os.getpid(), 1.0)
    assert judge(run, a_status(supervisor=gone), line)[0] is State.ORPHANED


def test_status_survives_the_file(run):
    status = a_status(stop_asked=5.5, ended=NOW, signal=9, reason="why")
    status.write(run)
    assert read_status(run) == status


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"supervisor": 3}', "null", "\x00"])
def test_a_damaged_status_is_no_status(run, text):
    run.root.mkdir()
    run.status.write_text(text)
    assert read_status(run) is None


def test_boot_times_may_drift_and_boot_ids_may_not():
    assert same_boot("time:1000", "time:1100")
    assert not same_boot("time:1000", "time:1300")
    assert not same_boot("a", "b")
    assert not same_boot("a", "time:1")


def test_looking_at_a_lock_neither_takes_nor_breaks_it(run):
    lock = RunLock.acquire(run.lock)
    assert is_held(run.lock)
    assert is_held(run.lock)
    with pytest.raises(BusyError):
        RunLock.acquire(run.lock)
    lock.release()
    assert not is_held(run.lock)
    assert not is_held(run.root / "none.lock")


@pytest.mark.skipif(os.name == "nt", reason="locks are not shared there")
def test_of_two_who_look_at_once_neither_takes_the_other_for_a_holder(run, monkeypatch):
    RunLock.acquire(run.lock).release()
    seen: list[bool | None] = []
    close = os.close

    def look_before_it_is_closed(descriptor: int) -> None:
        if not seen:
            seen.append(None)
            seen.append(is_held(run.lock))
        close(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("app.runs.lock.os.close", look_before_it_is_closed)
        assert is_held(run.lock) is False
    assert seen == [None, False]


def test_runs_are_listed_newest_first(tmp_path):
    for age, name in enumerate(["new", "old", "oldest"]):
        run = RunDir(tmp_path / name)
        a_status().write(run)
        moment = time.time() - 1000 * age
        os.utime(run.status, (moment, moment))
    (tmp_path / "no run").mkdir()
    assert [run.root.name for run in find_runs(tmp_path)] == ["new", "old", "oldest"]
    assert find_runs(tmp_path / "missing") == []


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40).filter(lambda line: b"\n" not in line),
            st.integers(0, 99).map(lambda step: encode("step", step=step).encode().rstrip()),
        ),
        max_size=20,
    ),
    st.integers(1, 400),
)
def test_the_tail_of_a_damaged_log_is_its_whole_events(tmp_path_factory, lines, num_bytes):
    path = tmp_path_factory.mktemp("tail") / "events.jsonl"
    content = b"".join(line + b"\n" for line in lines)
    path.write_bytes(content + b'{"type": "step", "st')
    steps = [event.get("step") for event in tail_events(path, num_bytes) if event["type"] == "step"]
    everything = [event.get("step") for event in tail_events(path, 10**6)]
    assert steps == everything[len(everything) - len(steps) :]


def test_following_yields_what_is_written_meanwhile_and_the_rest_after_the_end(tmp_path):
    path = tmp_path / "events.jsonl"
    write = EventWriter(path)
    looks = iter([False, False, True])

    def sleep(seconds):
        write("step", step=2)

    def is_over():
        over = next(looks)
        if over:
            write("end", reason="done")
        return over

    write("step", step=1)
    found = list(follow(path, is_over, sleep=sleep))
    seen = [event and event.get("step", "end") for event in found]
    assert seen == [1, None, 2, None, 2, "end"]


@pytest.mark.parametrize("years", [1, 50])
def test_a_clock_that_was_set_ahead_makes_no_run_silent_for_years(run, held, monkeypatch, years):
    """The supervisor is this process: nothing of the run can be older than it."""
    now = time.time()
    step = event_line("step", now, step=3, total_steps=9, step_time_s=2.0)
    ahead = now + years * 365 * 86400
    monkeypatch.setattr(time, "time", lambda: ahead)
    monkeypatch.setattr(ProcessId, "age", lambda self: 120.0)
    assert judge(run, a_status(started=now - 60), step, now=None) == (State.RUNNING, "")
    monkeypatch.setattr(ProcessId, "age", lambda self: None)  # where the system does not say
    assert judge(run, a_status(started=now - 60), step, now=None)[0] is State.STALLED


def test_a_clock_that_was_set_back_leaves_states_and_times_as_they_are(run, held):
    before = event_line("step", NOW + 9e6, step=3, total_steps=9, step_time_s=2.0)
    assert judge(run, a_status(started=NOW + 8e6), before) == (State.RUNNING, "")
    asked = a_status(started=NOW + 8e6, stop_asked=NOW + 9e6)
    assert judge(run, asked, before) == (State.STOPPING, "asked 0s ago")


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="the system does not say")
def test_the_age_of_a_process_is_what_psutil_says():
    import psutil

    me = ProcessId.of(os.getpid())
    theirs = time.time() - psutil.Process().create_time()
    assert me.age() == pytest.approx(theirs, abs=2)
    assert ProcessId(me.pid, me.start_time + 1).age() is None
