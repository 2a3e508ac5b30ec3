"""`menma queue`: jobs that run one after the other, without this terminal."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import completion, output
from app.cli.commands.runs import RUNS
from app.cli.options import Config, Json, Overrides, RunsDir, command_app
from app.queue.adding import job_name, job_spec
from app.queue.jobs import Job, JobSpec, JobState, kind_of
from app.queue.look import JobView, job_run, look_at, look_at_all
from app.queue.order import ordered
from app.queue.store import QueueStore, queue_folder
from app.queue.worker import ensure_worker, is_working
from app.runs import control
from app.runs.durations import duration
from trainer.contract.errors import UserError

app = command_app(help="Queue jobs: they run one after the other, without this terminal.")
Number = Annotated[
    int,
    typer.Argument(
        metavar="JOB", help="Number of a job.", show_default=False, autocompletion=completion.jobs
    ),
]
Numbers = Annotated[
    list[int],
    typer.Argument(
        metavar="JOB...",
        help="Numbers of jobs.",
        show_default=False,
        autocompletion=completion.jobs,
    ),
]
Maybe = Annotated[
    int | None,
    typer.Argument(metavar="[JOB]", help="Number of a job.", autocompletion=completion.jobs),
]
Priority = Annotated[int, typer.Option("--priority", help="Larger goes first.")]
After = Annotated[
    list[int] | None,
    typer.Option(
        "--after",
        metavar="JOB",
        help="Only once this job is done. Repeatable.",
        autocompletion=completion.jobs,
    ),
]
Gpus = Annotated[
    str | None,
    typer.Option("--gpus", metavar="N|0,1,…", help="How many GPUs it takes, or which; 0: none."),
]
Held = Annotated[bool, typer.Option("--hold", help="Wait until it is resumed.")]


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def add(
    command: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND...", help="A menma command line, such as: train my.toml"),
    ],
    name: Annotated[str, typer.Option("--name", help="What the list calls it.")] = "",
    priority: Priority = 0,
    after: After = None,
    gpus: Gpus = None,
    hold: Held = False,
    as_json: Json = False,
) -> None:
    """Queue a command: cache, train, sample, eval, merge, or a `lora` tool.

    Example: menma queue add --after 3 train configs/fish.toml --set training.seed=7
    """
    spec = job_spec(command, name=name, priority=priority, after=after or (), gpus=gpus, held=hold)
    store = QueueStore(queue_folder())
    _tell_added(store, [store.add(spec)], as_json=as_json)


@app.command("chain")
def add_chain(
    config: Config,
    steps: Annotated[
        str,
        typer.Option(
            "--steps",
            help="Out of cache, train, sample, merge; train-high and train-low instead of train "
            "train the experts of Wan 2.2 one after the other.",
        ),
    ] = "cache,train,sample",
    overrides: Overrides = None,
    priority: Priority = 0,
    after: After = None,
    gpus: Gpus = None,
    hold: Held = False,
    as_json: Json = False,
) -> None:
    """Queue all steps of a config, each after the one before.

    Example: menma queue chain configs/fish.toml --steps cache,train-high,train-low,sample,merge
    """
    from app.queue.chain import chain
    from trainer.contract.config_io import load_config

    wanted = [step.strip() for step in steps.split(",") if step.strip()]
    commands = chain(config, load_config(config, overrides or ()), wanted, overrides or ())
    specs = [
        job_spec(
            argv, name="", priority=priority, after=after or (), gpus=gpus, held=hold and not index
        )
        for index, argv in enumerate(commands)
    ]
    store = QueueStore(queue_folder())
    _tell_added(store, store.add_all(specs, chained=True), as_json=as_json)


@app.command("list")
def list_jobs(
    everything: Annotated[
        bool, typer.Option("--all", help="With all jobs that ended, not only the last ten.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the jobs: what runs, what is next, what broke and why."""
    store = QueueStore(queue_folder())
    views = ordered(look_at_all(store.jobs()))
    if as_json:
        output.json_data([view.to_json() for view in views])
        return
    if not everything:
        ended = [view for view in views if view.state.has_ended]
        views = [view for view in views if not view.state.has_ended] + ended[:10]
    if not views:
        output.say("The queue is empty. `menma queue add train CONFIG` queues a training.")
        return
    headers = ("ID", "KIND", "NAME", "STATE", "STEP", "ETA", "GPU", "WHY")
    output.data(output.table(headers, map(_row, views), right="ID STEP ETA"))
    if store.note:
        output.warn(store.note)
    if store.paused:
        output.say("The queue is paused: nothing is started. `menma queue resume` goes on.")
    elif any(view.state is JobState.QUEUED for view in views) and not is_working(store.folder):
        output.say("No worker is at work, as after a restart: `menma queue resume` starts one.")


@app.command()
def show(number: Number, as_json: Json = False) -> None:
    """Show one job: command, state, folder."""
    view = _view(QueueStore(queue_folder()), number)
    if as_json:
        output.json_data(view.to_json())
        return
    for line in _details(view):
        output.data(line)


@app.command()
def move(
    number: Number,
    before: Annotated[
        int | None, typer.Option("--before", metavar="JOB", help="Right before this job.")
    ] = None,
    top: Annotated[bool, typer.Option("--top", help="Before all others.")] = False,
    bottom: Annotated[bool, typer.Option("--bottom", help="Behind all of its priority.")] = False,
    priority: Annotated[int | None, typer.Option("--priority", help="Larger goes first.")] = None,
) -> None:
    """Change when a job that waits gets its turn."""
    if sum([before is not None, top, bottom, priority is not None]) != 1:
        raise UserError("one of --before, --top, --bottom and --priority is needed")
    store = QueueStore(queue_folder())
    _require_waiting(store, number)
    if priority is not None:
        store.set_priority(number, priority)
        return
    if top:
        waiting = [job.id for job in store.jobs() if job.waits and job.id != number]
        before = waiting[0] if waiting else None
    store.move(number, before=before)


@app.command()
def pause(number: Maybe = None) -> None:
    """Keep a job from starting; without a number: all of them. What runs goes on."""
    store = QueueStore(queue_folder())
    if number is None:
        store.paused = True
        output.say("Paused: nothing is started until `menma queue resume`. What runs goes on.")
        return
    _require_waiting(store, number)
    store.hold(number, held=True)


@app.command()
def resume(number: Maybe = None) -> None:
    """Let a paused job start; without a number: the queue."""
    store = QueueStore(queue_folder())
    if number is None:
        store.paused = False
    else:
        _require_waiting(store, number)
        store.hold(number, held=False)
    ensure_worker(store.folder)


@app.command()
def cancel(
    numbers: Numbers,
    now: Annotated[bool, typer.Option("--now", help="End one that runs without saving.")] = False,
    kill: Annotated[bool, typer.Option("--kill", help="Kill one that runs.")] = False,
) -> None:
    """Take jobs out of the queue; one that runs saves and ends."""
    store = QueueStore(queue_folder())
    urgency = control.Urgency.SAVE
    if now or kill:
        urgency = control.Urgency.KILL if kill else control.Urgency.NOW
    for job in [store.job(number) for number in numbers]:
        store.cancel(job.id)
        view = _view(store, job.id)  # it may have been started just now
        if view.job.claim is not None and view.state.is_live:
            control.stop(job_run(view.job.claim), urgency)
            output.say(f"Job {job.id} was asked to stop.")
        elif view.state.has_ended and view.state is not JobState.CANCELLED:
            output.say(f"Job {job.id} has ended already: {view.state.value}")


@app.command()
def retry(numbers: Numbers, as_json: Json = False) -> None:
    """Queue jobs again that did not end well; what waited for them waits for the new ones."""
    store = QueueStore(queue_folder())
    views = [_view(store, number) for number in numbers]
    for view in views:
        if not view.state.has_ended:
            raise UserError(f"job {view.job.id} has not ended: {view.state.value}")
    added = []
    for view in views:
        new = store.add(view.job.spec)
        store.replace(view.job.id, new)
        added.append(new)
    _tell_added(store, added, as_json=as_json)


@app.command()
def duplicate(
    number: Number,
    overrides: Overrides = None,
    edit: Annotated[
        bool, typer.Option("--edit", help="Change the command line in $EDITOR first.")
    ] = False,
    name: Annotated[str, typer.Option("--name", help="What the list calls it.")] = "",
    as_json: Json = False,
) -> None:
    """Queue a job once more, changed.

    Example: menma queue duplicate 3 --set training.seed=7 --set 'name="fish-7"'
    """
    store = QueueStore(queue_folder())
    spec = store.job(number).spec
    argv = [*spec.argv, *(part for text in overrides or () for part in ("--set", text))]
    if edit:
        argv = _edited(argv)
    new = JobSpec(
        argv=tuple(argv),
        name=name or job_name(argv),
        cwd=spec.cwd,
        environment=spec.environment,
        priority=spec.priority,
        gpus=spec.gpus,
    )
    kind_of(new.argv)
    _tell_added(store, [store.add(new)], as_json=as_json)


@app.command()
def remove(
    numbers: Annotated[
        list[int] | None, typer.Argument(metavar="[JOB...]", autocompletion=completion.jobs)
    ] = None,
    ended: Annotated[bool, typer.Option("--ended", help="All jobs that have ended.")] = False,
) -> None:
    """Forget jobs that have ended or were never started. Their files stay."""
    store = QueueStore(queue_folder())
    views = look_at_all(store.jobs())
    if ended:
        chosen = [view.job.id for view in views if view.state.has_ended]
    elif numbers:
        live = [view.job.id for view in views if view.state.is_live and view.job.id in numbers]
        if live:
            raise UserError(f"job {live[0]} runs", hint=f"menma queue cancel {live[0]}")
        chosen = [store.job(number).id for number in numbers]
    else:
        raise UserError("numbers of jobs, or --ended, are needed")
    store.remove(chosen)
    output.say(f"{len(chosen)} jobs removed from the list.")


@app.command()
def logs(
    number: Number,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")
    ] = False,
) -> None:
    """Show what a job has printed."""
    store = QueueStore(queue_folder())
    shown: dict[Path, int] = {}
    while True:
        view = _view(store, number)
        if view.job.claim is None:
            raise UserError(f"job {number} was not started yet", hint="menma queue list")
        folders = [view.job.claim.folder, job_run(view.job.claim).root]
        for file in dict.fromkeys(folder / "console.log" for folder in folders):
            shown[file] = _print_from(file, shown.get(file, 0))
        if not follow or view.state.has_ended:
            return
        time.sleep(0.5)


@app.command()
def rebuild(runs_dir: RunsDir = RUNS) -> None:
    """Make a lost or broken list of jobs anew, from what the jobs have left on the disk.

    Jobs that were started come back as they are; those that only waited have to be queued again.
    """
    from app.queue.rebuild import rebuild as rebuild_queue
    from app.queue.worker import worker_lock
    from app.runs.lock import RunLock
    from trainer.contract.errors import BusyError

    folder = queue_folder()
    try:
        lock = RunLock.acquire(worker_lock(folder))
    except BusyError:
        hint = "it ends when nothing is left to do; or end the process `python -m app.queue.worker`"
        raise BusyError("a worker is at work", hint=hint) from None
    try:
        found = rebuild_queue(folder, [runs_dir])
    finally:
        lock.release()
    if found.kept is not None:
        output.say(f"The list could not be read; it is kept as {found.kept}")
    for place in found.unreadable:
        output.warn(f"{place}: its files do not say what job it was")
    num = len(found.jobs)
    output.say(f"{num} {'job is' if num == 1 else 'jobs are'} in the list again.")
    output.say("See them: menma queue list. What waits starts with: menma queue resume")


@app.command()
def worker(
    stay: Annotated[
        bool, typer.Option("--stay", help="Do not end when the queue is empty.")
    ] = False,
) -> None:
    """Start jobs until the queue is empty. `menma queue add` starts one in the background."""
    from app.queue.worker import work
    from trainer.contract.errors import BusyError

    folder = queue_folder()
    try:
        work(folder, stay=stay)
    except BusyError:
        raise BusyError("a worker is at work already", hint="`menma queue list`") from None


def _edited(argv: Sequence[str]) -> list[str]:
    from app.domain.external_editor import edited

    text = edited(shlex.join(argv) + "\n", "command.txt")
    if text is None or not text.strip():
        raise UserError("the command line was not saved: nothing is queued")
    return shlex.split(text)


def _view(store: QueueStore, number: int) -> JobView:
    job = store.job(number)
    if job.waits:
        return next(view for view in look_at_all(store.jobs()) if view.job.id == number)
    return look_at(job)


def _require_waiting(store: QueueStore, number: int) -> Job:
    job = store.job(number)
    if not job.waits:
        raise UserError(f"job {number} waits no longer: {look_at(job).state.value}")
    return job


def _tell_added(store: QueueStore, numbers: Sequence[int], *, as_json: bool) -> None:
    ensure_worker(store.folder)
    if as_json:
        output.json_data([_view(store, number).to_json() for number in numbers])
        return
    for number in numbers:
        output.data(str(number))
    words = "Queued." if not store.paused else "Queued; the queue is paused."
    output.say(f"{words} See it: menma queue list")


def _row(view: JobView) -> tuple[str, ...]:
    run = view.run
    step = ""
    if run is not None and run.step is not None:
        step = f"{run.step}/{run.total_steps}" if run.total_steps else str(run.step)
    claim = view.job.claim
    return (
        str(view.job.id),
        view.job.spec.kind.name,
        view.job.spec.name,
        f"{view.state.sign} {view.state.value}",
        step,
        duration(run.eta_s) if run and run.eta_s and view.state.is_live else "",
        ",".join(claim.devices) if claim and view.state.is_live else "",
        view.why,
    )


def _details(view: JobView) -> list[str]:
    job, claim = view.job, view.job.claim
    shown = [
        ("job", str(job.id)),
        ("state", f"{view.state.value}{f': {view.why}' if view.why else ''}"),
        ("command", f"menma {shlex.join(job.spec.argv)}"),
        ("in", str(job.spec.cwd)),
        ("gpus", json.dumps(job.spec.gpus)),
        ("priority", str(job.spec.priority)),
        ("after", ", ".join(map(str, job.spec.after))),
        ("run", str(view.run.root) if view.run else ""),
        ("log", str(claim.folder / "console.log") if claim else ""),
    ]
    return [f"{name:<10}{value}" for name, value in shown if value]


def _print_from(file: Path, offset: int) -> int:
    try:
        with file.open("rb") as stream:
            stream.seek(offset)
            content: Any = stream.read()
    except OSError:
        return offset
    for line in content.decode("utf-8", "replace").splitlines():
        output.data(line)
    return offset + len(content)
