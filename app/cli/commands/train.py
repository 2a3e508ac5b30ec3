"""`menma train`: start a run that outlives this terminal, and show it."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from app.cli import output
from app.cli.exit_codes import ExitCode
from app.cli.options import Config, Overrides, command_app
from trainer.contract.errors import UserError
from trainer.contract.run_dir import RunDir

app = command_app()

INTERRUPT_WORDS = (
    "Finishing the step, saving, then ending. Ctrl-C again ends now, without saving.",
    "Ending now. Ctrl-C again kills it.",
    "Killed.",
)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option(
            "--resume",
            metavar="auto|never|PATH",
            help="auto: go on from the run's newest whole checkpoint. never: start over; an "
            "earlier run of this name is kept as NAME.1, NAME.2, ... PATH: from this checkpoint.",
        ),
    ] = "auto",
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Start the run and come back at once.")
    ] = False,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", min=1, help="Train with this many GPUs of this machine."),
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(
            "--hostfile",
            metavar="FILE",
            help="Train on several machines, this one first: a line `HOST slots=N` for each.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write the run's events as JSON lines to stdout.")
    ] = False,
) -> None:
    """Train a LoRA, or the whole model.

    The run goes on when this terminal is closed; `menma runs watch` shows it again.

    Ctrl-C once saves a checkpoint and ends the run, twice ends it now, three times kills it.
    """
    from app.cli.watching import counted_interrupts
    from app.domain.complete import complete_config
    from app.runs import launch
    from app.runs.child import trainer_command
    from app.runs.scheduled import take_place
    from trainer.contract.config_io import dump_config

    settings = [*(overrides or ()), *_settings(gpus, hostfile)]
    place = take_place(os.environ)
    if place is not None:
        place.refuse(gpus=gpus, hostfile=hostfile, detach=detach)
    loaded = complete_config(config, settings, "train")
    if place is not None and not place.is_first:
        place.work(config, settings, resume)
    run, text = RunDir(loaded.run_dir.absolute()), dump_config(loaded, base=Path.cwd())
    if _nothing_to_do(run, text, resume, others_wait=place is not None):
        return
    lock = launch.claim(run)
    offset = run.events.stat().st_size if run.events.exists() else 0
    preparation = launch.Preparation(
        config_text=text,
        overrides=tuple(settings),
        resume=resume,
        argv=("menma", *sys.argv[1:]),
    )
    command = trainer_command("train", launch.prepare(run, preparation))
    shown = loaded.run_dir
    if detach:
        launch.start(run, lock, command)
        output.data(str(shown))
        output.say(f"Training in the background. See it: menma runs watch {shown}")
        output.say(f"End it: menma runs stop {shown}")
        return
    # From here on Ctrl-C is meant for the run: raised now, it would leave one behind.
    with counted_interrupts() as count:
        launch.start(run, lock, command)
        output.say(f"Run {shown}: it goes on when this terminal is closed.")
        _follow(run, offset, count, as_json=as_json)


def _settings(gpus: int | None, hostfile: Path | None) -> Iterator[str]:
    """Yield what the options mean in the config."""
    if gpus is not None:
        yield f"distributed.num_processes={gpus}"
    if hostfile is not None:
        yield f"distributed.hostfile={json.dumps(str(hostfile.absolute()))}"


def _nothing_to_do(run: RunDir, text: str, resume: str, *, others_wait: bool) -> bool:
    """Look at an earlier run of this name; return whether it is finished as it stands.

    Where the trainers of other ranks wait for this one, the trainer has to tell them so.
    """
    from app.runs import launch
    from app.runs.state import State, is_run_dir, read_state

    if resume not in {"auto", "never"} and not Path(resume).exists():
        raise UserError(
            f"no such checkpoint: {resume}",
            hint=f"--resume takes auto, never, or a folder such as {run.checkpoints}/step-00000500",
        )
    if not is_run_dir(run.root):
        return False
    if resume == "never":
        moved = launch.move_aside(run)
        output.say(f"The earlier run is kept as {moved}")
        return False
    earlier = read_state(run)
    if earlier.state.is_live:
        return False  # claiming it says who holds it
    changes = _changes(run, text)
    finished = earlier.state is State.DONE and not changes and resume == "auto"
    if finished and not others_wait:
        output.say(f"{run.root.name} is finished (step {earlier.step}): {run.output}")
        output.say("To train longer raise training.max_steps; to start over add --resume never.")
        return True
    if changes:
        output.say("Changed since the last start of this run:")
        for change in changes:
            output.say(f"  {change}")
    return False


def _changes(run: RunDir, text: str) -> list[str]:
    """Return how the config differs from the one the run was started with."""
    from app.domain.presets import differences

    try:
        before = tomllib.loads(run.config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    changed = differences(before, tomllib.loads(text))
    return [f"{key}: {old} -> {new}" for key, (old, new) in changed.items()]


def _follow(run: RunDir, offset: int, count: Callable[[], int], *, as_json: bool) -> None:
    from app.cli.watching import finish, watch
    from app.runs import control

    def on_interrupt(times: int, say: Callable[[str], None]) -> None:
        level = min(times, len(INTERRUPT_WORDS))
        control.stop(run, control.Urgency(level))
        say(INTERRUPT_WORDS[level - 1])

    watched = watch(run, on_interrupt, count=count, offset=offset, as_json=as_json)
    code = finish(run, watched)
    if code != ExitCode.DONE:
        raise typer.Exit(code)
