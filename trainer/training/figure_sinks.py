"""Where the figures of a run go besides its event log."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.contract.config import LoggingSection, RunConfig
from trainer.contract.errors import ConfigError, RunError
from trainer.contract.figures import figures_of
from trainer.contract.files import write_text
from trainer.contract.run_dir import RunDir
from trainer.training.reporter import Sink

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


def figure_sinks(config: RunConfig, run_dir: RunDir) -> list[Sink]:
    """Return what `[logging]` asks for.

    Raises:
        ConfigError: a package is not installed.
        RunError: W&B does not let us in.
    """
    sinks: list[Sink] = []
    if config.logging.tensorboard:
        sinks.append(TensorBoardSink(run_dir.tensorboard))
    if config.logging.wandb:
        sinks.append(WandbSink(config, run_dir))
    return sinks


class TensorBoardSink:
    """Writes the figures of events as TensorBoard scalars.

    A run that goes on from an earlier step takes back the figures of the steps it does again.
    """

    def __init__(self, folder: Path) -> None:
        """Prepare; the log is opened with the first figure.

        Raises:
            ConfigError: the tensorboard package is not installed.
        """
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "logging.tensorboard needs the tensorboard package",
                hint="pip install tensorboard, or set logging.tensorboard = false",
            ) from error
        self._class = SummaryWriter
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Write what of the event is a figure."""
        figures = figures_of(event)
        if not figures:
            return
        if self._writer is None:
            self._writer = self._class(log_dir=str(self._folder), purge_step=event["step"])
        for name, value in figures.items():
            self._writer.add_scalar(name, value, event["step"])
        self._writer.flush()


class WandbSink:
    """Sends figures and the config to Weights & Biases.

    The step is a figure of its own (W&B's `step_metric`): its inner counter only goes up, and would
    drop the steps that a resumed run does again. A resumed run goes on in the same W&B run.
    """

    ID_FILE = "wandb-id"

    def __init__(self, config: RunConfig, run_dir: RunDir) -> None:
        """Open the W&B run.

        Raises:
            ConfigError: the wandb package is not installed.
            RunError: there is no key, no network, or no such project.
        """
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "logging.wandb needs the wandb package",
                hint="pip install wandb, or set logging.wandb = false",
            ) from error
        try:
            self._run = wandb.init(
                project=config.logging.wandb_project,
                entity=config.logging.wandb_entity,
                mode=config.logging.wandb_mode,
                name=run_dir.root.name,
                id=_id_of(run_dir),
                resume="allow",
                dir=str(run_dir.root),
                config=_told_config(config),
            )
        except Exception as error:  # its own kinds of errors differ from version to version
            raise RunError(
                f"W&B does not take this run: {error}",
                hint='`wandb login` stores a key; logging.wandb_mode = "offline" needs none',
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Send what of the event is a figure; close the W&B run with ours."""
        if event["type"] == "end":
            self._run.finish(exit_code=1 if event.get("reason") == "failed" else 0)
        elif figures := figures_of(event):
            self._run.log({**figures, "step": event["step"]})


def _id_of(run_dir: RunDir) -> str:
    path = run_dir.root / WandbSink.ID_FILE
    try:
        if known := path.read_text(encoding="utf-8").strip():
            return known
    except FileNotFoundError:
        pass
    made = uuid.uuid4().hex[:12]
    write_text(path, made + "\n")
    return made


def _told_config(config: RunConfig) -> dict[str, Any]:
    """Return the config as plain values, without addresses that may be secrets."""
    told = config.model_dump(mode="json")
    told["logging"] = {k: v for k, v in told["logging"].items() if k in _TOLD_LOGGING}
    return told


_TOLD_LOGGING = set(LoggingSection.model_fields) - {"webhook"}
