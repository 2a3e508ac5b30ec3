"""`menma runs`: see and steer the runs of this machine, from any terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import output
from app.cli.exit_codes import ExitCode
from app.cli.options import Json, RunsDir, command_app
from app.runs import control
from app.runs.durations import duration
from app.runs.state import RunState, State, find_runs, is_run_dir, read_state
from app.runs.validation import ValidationPoint, curve_words, validation_curve
from trainer.contract.errors import UserError
from trainer.contract.registry import nearest
from trainer.contract.run_dir import Request, RunDir

app = command_app(help="See and steer the runs of this machine.")
Name = Annotated[
    str, typer.Argument(metavar="RUN", help="Name or folder of a run.", show_default=False)
]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Come back without waiting for it.")]

RUNS = Path("runs")
POLL_S = 0.2
WATCH_FROM_BYTES = 32 * 1024


@app.command("list")
def list_runs(runs_dir: RunsDir = RUNS, as_json: Json = False) -> None:
    """List the runs, the one that changed last first."""
    states = [read_state(run) for run in find_runs(runs_dir)]
    if as_json:
        output.json_data([state.to_json() for state in states])
        return
    if not states:
        output.say(f"No runs in {runs_dir}. `menma train CONFIG` starts one.")
        return
    headers = ("NAME", "STATE", "STEP", "LOSS", "ETA", "WHY")
    output.data(output.table(headers, map(_row, states), right="STEP LOSS ETA"))


@app.command()
def show(name: Name, runs_dir: RunsDir = RUNS, as_json: Json = False) -> None:
    """Show one run: state, figures, files; of one that failed, why and what to try."""
    from app.cli.watching import output_files
    from app.runs.failure import read_failure

    run = find_run(name, runs_dir)
    state = read_state(run)
    curve = validation_curve(run)
    files = {
        "config": str(run.config),
        "events": str(run.events),
        "console": str(run.console),
        "checkpoints": sorted(str(path) for path in run.checkpoints.glob("step-*")),
        "output": output_files(run),
        "samples": sorted(str(path) for path in run.samples.glob("*") if path.is_file()),
    }
    failure = read_failure(run, state)
    if as_json:
        points = [point.to_json() for point in curve]
        why = failure.to_json() if failure else None
        whole = {**state.to_json(), "validation": points, "files": files, "failure": why}
        output.json_data(whole)
        return
    for line in _details(state, curve, files):
        output.data(line)
    if failure is not None:
        output.data(f"\n{failure.text()}")


@app.command("compare")
def compare_runs(
    names: Annotated[
        list[str],
        typer.Argument(metavar="RUN RUN…", help="Names or folders of runs.", show_default=False),
    ],
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Compare runs: their figures, and the options in which their configs differ."""
    from app.domain.comparison import BEST, UNLIKE
    from app.domain.run_comparison import config_rows, figure_rows, read_runs

    if len(names) < 2:
        raise UserError("two runs or more are needed", hint="`menma runs list` shows them")
    found = read_runs([find_run(name, runs_dir) for name in names])
    rows, options = figure_rows(found), config_rows(found)
    heads = [run.label for run in found]
    if as_json:
        config = {key: dict(zip(heads, values, strict=True)) for key, values in options}
        output.json_data({"runs": [run.to_json() for run in found], "config": config})
        return
    cells = [(row.name + ("" if row.comparable else f" {UNLIKE}"), *row.cells) for row in rows]
    output.data(output.table(("FIGURE", *heads), cells, right=" ".join(heads)))
    if options:
        output.data()
        output.data(output.table(("OPTION", *heads), [(key, *each) for key, each in options]))
    for run in found:
        if run.note:
            output.say(f"{run.label}: {run.note}")
    if any(BEST in cell for row in rows for cell in row.cells):
        output.say(f"{BEST} best of its row")
    if not all(row.comparable for row in rows):
        output.say(f"{UNLIKE} not comparable: data, model or the loss itself differ")


@app.command()
def watch(
    name: Name,
    runs_dir: RunsDir = RUNS,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write the run's events as JSON lines to stdout.")
    ] = False,
) -> None:
    """Show a run live. Ctrl-C leaves; the run goes on."""
    from app.cli import watching

    run = find_run(name, runs_dir)

    def leave(times: int, say: Callable[[str], None]) -> None:
        say(f"The run goes on. End it with: menma runs stop {name}")
        raise KeyboardInterrupt

    size = run.events.stat().st_size if run.events.exists() else 0
    offset = 0 if as_json else max(0, size - WATCH_FROM_BYTES)
    code = watching.finish(run, watching.watch(run, leave, offset=offset, as_json=as_json))
    if code != ExitCode.DONE:
        raise typer.Exit(code)


@app.command()
def stop(
    name: Name,
    runs_dir: RunsDir = RUNS,
    now: Annotated[bool, typer.Option("--now", help="End without saving.")] = False,
    kill: Annotated[bool, typer.Option("--kill", help="Kill it, all its processes.")] = False,
    no_wait: NoWait = False,
) -> None:
    """Save a checkpoint, then end the run.

    `menma train` with the same config goes on from there.
    """
    run = find_run(name, runs_dir)
    state = read_state(run)
    if not state.state.is_live:
        output.say(f"{state.name} has ended already: {state.state.value}")
        return
    urgency = control.Urgency.SAVE
    if kill or now:
        urgency = control.Urgency.KILL if kill else control.Urgency.NOW
    elif state.state is State.STOPPING:
        output.say(f"{state.name} was asked already; --now ends it without saving, --kill kills it")
    control.stop(run, urgency)
    if no_wait:
        output.say(f"Asked {state.name} to stop.")
        return
    if urgency is control.Urgency.SAVE:
        output.say(f"{state.name}: finishing the step and saving. Ctrl-C leaves; it still stops.")
    _wait(lambda: not read_state(run).state.is_live)
    state = read_state(run)
    output.say(f"{state.name}: {state.state.value}{_reason(state)}")


@app.command()
def save(name: Name, runs_dir: RunsDir = RUNS, no_wait: NoWait = False) -> None:
    """Make a running run save a checkpoint after its current step."""
    _ask(find_run(name, runs_dir), "save", no_wait=no_wait)


@app.command()
def sample(name: Name, runs_dir: RunsDir = RUNS, no_wait: NoWait = False) -> None:
    """Make a running run draw its sample prompts after its current step."""
    _ask(find_run(name, runs_dir), "sample", no_wait=no_wait)


@app.command("csv")
def export_csv(
    name: Name,
    runs_dir: RunsDir = RUNS,
    to: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; stdout without it.")
    ] = None,
) -> None:
    """Write the figures of all steps and validations as CSV."""
    from app.runs.export import figures_csv
    from trainer.contract.files import write_text

    text = figures_csv(find_run(name, runs_dir))
    if to is None:
        output.data(text.rstrip("\n"))
        return
    write_text(to, text)
    output.say(f"Wrote {to}.")


@app.command()
def notify(name: Name, runs_dir: RunsDir = RUNS) -> None:
    """Tell the config's webhook now how the run is, to try it."""
    from app.runs import webhook

    run = find_run(name, runs_dir)
    wanted = webhook.wanted_address(run)
    if wanted is None:
        raise UserError(
            f"the config of {run.root.name} names no logging.webhook",
            hint="`menma config set CONFIG logging.webhook=env:MY_WEBHOOK` for its next start",
        )
    problem = webhook.send(wanted, webhook.message_of(read_state(run), run))
    if problem:
        raise UserError(f"logging.webhook: {problem}")
    output.say("Told.")


def find_run(name: str, runs_dir: Path) -> RunDir:
    """Return the run of a name or a folder.

    Raises:
        UserError: there is none; the hint names the nearest.
    """
    for path in (runs_dir / name, Path(name)):
        if is_run_dir(path):
            return RunDir(path)
    known = [run.root.name for run in find_runs(runs_dir)]
    hint = nearest(name, known) if known else f"there are no runs in {runs_dir}"
    raise UserError(f"no such run: {name}", hint=hint)


def _ask(run: RunDir, what: Request, *, no_wait: bool) -> None:
    state = read_state(run)
    if not state.state.is_live:
        raise UserError(
            f"{state.name} is not training: {state.state.value}",
            hint="`menma runs list` shows what is",
        )
    request = run.request(what)
    if no_wait:
        output.say(f"Asked {state.name} to {what} after its current step.")
        return
    output.say(f"{state.name}: {what} after the current step. Ctrl-C leaves; it is still done.")
    done, refused = request.with_suffix(".done"), request.with_suffix(".err")
    _wait(lambda: done.exists() or refused.exists() or not read_state(run).state.is_live)
    if refused.exists():
        reason = json.loads(refused.read_text(encoding="utf-8")).get("error", "")
        raise UserError(f"{state.name} refuses to {what}: {reason}")
    if not done.exists():
        output.say(f"error: {state.name} ended first: {read_state(run).state.value}")
        raise typer.Exit(ExitCode.FAILED)
    output.say(f"{state.name}: {what} done.")


def _wait(is_over: Callable[[], bool]) -> None:
    while not is_over():
        time.sleep(POLL_S)


def _row(state: RunState) -> tuple[str, ...]:
    steps = "" if state.step is None else f"{state.step}/{state.total_steps or '?'}"
    left = state.eta_s if state.state.is_live else None
    return (
        state.name,
        f"{state.state.sign} {state.state.value}",
        steps,
        "" if state.loss is None else f"{state.loss:.4f}",
        "" if left is None else duration(left),
        state.why,
    )


def _reason(state: RunState) -> str:
    return f" ({state.why})" if state.why else ""


def _details(state: RunState, curve: list[ValidationPoint], files: dict[str, Any]) -> list[str]:
    shown = {
        "name": state.name,
        "folder": str(state.root),
        "state": f"{state.state.value}{_reason(state)}",
        "step": "" if state.step is None else f"{state.step} of {state.total_steps or '?'}",
        "loss": "" if state.loss is None else f"{state.loss:.4f}",
        "validation": curve_words(curve),
        "ETA": "" if state.eta_s is None or not state.state.is_live else duration(state.eta_s),
        "started": _clock(state.started),
        "ended": _clock(state.ended),
    }
    lines = [f"{key:<12}{value}" for key, value in shown.items() if value]
    for key, value in files.items():
        paths = value if isinstance(value, list) else [value]
        lines += [f"{key:<12}{path}" for path in paths]
    return lines


def _clock(moment: float | None) -> str:
    return "" if moment is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
