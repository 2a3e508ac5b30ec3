"""The file of a config that is being edited: opened, and saved in one step, never blindly."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path

from app.domain.config_document import ConfigDocument
from app.runs.state import find_runs
from trainer.contract.errors import ConfigError, DiskError
from trainer.contract.files import write_bytes
from trainer.contract.run_dir import RunDir

CONFIGS = Path("configs")
BOM = "\ufeff"


@dataclass(slots=True)
class ConfigFile:
    """A config file and its text."""

    path: Path
    document: ConfigDocument
    saved: str | None
    """The text in the file as we know it; None: there is no file yet."""
    bom: str = ""
    """Mark at the start of the file, kept for the programs that want it."""

    @property
    def is_changed(self) -> bool:
        """Whether there is something that is not saved."""
        return self.document.text != self.saved

    @property
    def changed_outside(self) -> bool:
        """Whether somebody else has written or removed the file since it was read."""
        try:
            now = _read(self.path)
        except FileNotFoundError:
            return self.saved is not None
        except (OSError, UnicodeDecodeError):
            return True
        return now != (None if self.saved is None else self.bom + self.saved)

    def save(self) -> None:
        """Write the text, in one step. A link stays one, and the file keeps its permissions.

        Raises:
            DiskError: it is read-only, or cannot be written; the file is as it was.
        """
        target = self.path.resolve()
        mode = target.stat().st_mode if target.exists() else None
        if mode is not None and not (mode & _WRITABLE and os.access(target, os.W_OK)):
            raise DiskError(
                f"{self.path} is read-only", hint="make it writable, or copy it to another name"
            )
        text = self.document.text
        write_bytes(target, (self.bom + text).encode())
        if mode is not None:
            target.chmod(stat.S_IMODE(mode))
        self.saved = text

    def difference(self) -> str:
        """Return what saving would change, as a unified diff; empty: nothing."""
        before = (self.saved or "").splitlines(keepends=True)
        after = self.document.text.splitlines(keepends=True)
        lines = unified_diff(before, after, f"{self.path} (saved)", f"{self.path} (now)")
        return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)


_WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


def open_config(path: Path) -> ConfigFile:
    """Open a config. That of a run is what the run was started with: a copy of it is opened.

    Raises:
        ConfigError: it is not there, cannot be read, or is not UTF-8.
    """
    try:
        text = _read(path)
    except FileNotFoundError:
        raise ConfigError(
            f"config file not found: {path}", hint="`menma new -o FILE` writes one"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    bom = BOM if text.startswith(BOM) else ""
    text = text.removeprefix(BOM)
    if is_of_run(path):
        return ConfigFile(_free_name(path.absolute().parent.name), ConfigDocument(text), None, bom)
    return ConfigFile(path, ConfigDocument(text), text, bom)


def is_of_run(path: Path) -> bool:
    """Tell whether a file is the config in a run directory."""
    run = RunDir(path.parent)
    return path.name == run.config.name and (run.events.exists() or run.command.exists())


def find_configs(runs_dir: Path, configs: Path = CONFIGS) -> list[Path]:
    """Return the configs that can be chosen: those of `configs/`, then those of runs."""
    own = sorted(configs.rglob("*.toml")) if configs.is_dir() else []
    runs = [run.config for run in find_runs(runs_dir)]
    return [*own, *(path for path in runs if path.is_file())]


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8")


def _free_name(name: str) -> Path:
    path, number = CONFIGS / f"{name}.toml", 2
    while path.exists():
        path, number = CONFIGS / f"{name}-{number}.toml", number + 1
    return path
