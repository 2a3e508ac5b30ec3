"""Files of the Hugging Face hub: `hf:owner/repo/path`, or `hf:owner/repo@revision/path`.

A config that is read gets the paths of files that are in the hub's local cache; the others are
downloaded by the job that needs them, or by `menma fetch`. The token of private and gated models is
huggingface_hub's own (`hf auth login`, HF_TOKEN): nothing here sees it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.contract.errors import ConfigError

if TYPE_CHECKING:
    from trainer.contract.config import RunConfig

PREFIX = "hf:"
_NAME = r"[A-Za-z0-9][\w.-]*"
_REFERENCE = re.compile(
    rf"hf:/*(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[\w.-]+))?/(?P<path>[^@]+)"
)
MODEL_FIELDS = (
    "transformer", "transformer_high_noise", "vae", "text_encoder", "tokenizer", "image_encoder",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file or folder of a repository."""

    repo: str
    path: str
    revision: str = "main"

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder: its last part has no ending."""
        return not Path(self.path).suffix

    def __str__(self) -> str:
        """Return it as it is written in a config."""
        at = "" if self.revision == "main" else f"@{self.revision}"
        return f"{PREFIX}{self.repo}{at}/{self.path}"


def is_reference(value: Any) -> bool:
    """Tell whether a value of a config means the hub, well written or not."""
    return isinstance(value, str | Path) and str(value).startswith(PREFIX)


def parse_reference(text: str) -> HubFile:
    """Read a reference.

    Raises:
        ValueError: it is none; the message says how they are written.
    """
    found = _REFERENCE.fullmatch(text.strip().rstrip("/"))
    parts = [] if found is None else found["path"].split("/")
    if found is None or any(part in {"", ".", ".."} for part in parts):
        raise ValueError(
            f"{text!r} names no file of the hub: hf:owner/repo/file, or hf:owner/repo@revision/file"
        )
    return HubFile(found["repo"], found["path"], found["revision"] or "main")


def cached_path(file: HubFile) -> Path | None:
    """Return where the hub's cache has all of a file or folder, or None. No network is used."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    if not file.is_folder:
        found = try_to_load_from_cache(file.repo, file.path, revision=file.revision)
        return Path(found) if isinstance(found, str) else None
    try:
        root = snapshot_download(
            file.repo,
            revision=file.revision,
            allow_patterns=[f"{file.path}/*"],
            local_files_only=True,
        )
    except OSError:  # of which all its errors about missing files are
        return None
    path = Path(root) / file.path
    return path if path.is_dir() and any(path.iterdir()) else None


def is_offline(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether the user has forbidden the network (`HF_HUB_OFFLINE=1`)."""
    return environment.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def download(file: HubFile) -> Path:
    """Return the local path of a file or folder, downloaded unless the cache has its newest state.

    Raises:
        ConfigError: there is no such file, it is not for us, or nobody can be reached and the cache
            does not have it.
    """
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    try:
        if not file.is_folder:
            return Path(hf_hub_download(file.repo, file.path, revision=file.revision))
        wanted = [f"{file.path}/*"]
        root = snapshot_download(file.repo, revision=file.revision, allow_patterns=wanted)
        path = Path(root) / file.path
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"{file}: its owners want you to agree first",
            hint=f"do so at huggingface.co/{file.repo}, then `hf auth login`",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"{file}: there is no such repository, or it is private",
            hint="`hf auth login` for a private one",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"{file}: the repository has no revision {file.revision!r}") from error
    except errors.RemoteEntryNotFoundError as error:
        raise ConfigError(f"{file}: the repository has no such file") from error
    except (OSError, errors.LocalEntryNotFoundError) as error:
        offline = "HF_HUB_OFFLINE forbids the network" if is_offline() else "is the network there?"
        raise ConfigError(
            f"{file} cannot be downloaded, and the cache does not have it",
            hint=f"{offline} A file of your own works as well: give its path",
        ) from error
    if not path.is_dir():
        raise ConfigError(f"{file}: the repository has no such folder")
    return path


def references(config: RunConfig) -> dict[str, HubFile]:
    """Return the fields of `[model]` that are still of the hub, with what they name."""
    named = {field: getattr(config.model, field) for field in MODEL_FIELDS}
    return {
        field: parse_reference(value.as_posix())
        for field, value in named.items()
        if is_reference(value)
    }


def with_local_files(config: RunConfig, find: Callable[[HubFile], Path | None]) -> RunConfig:
    """Return the config with the paths that `find` knows in place of references."""
    found = {field: find(file) for field, file in references(config).items()}
    known = {field: path for field, path in found.items() if path is not None}
    if not known:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update=known)})
