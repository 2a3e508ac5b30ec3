"""What every job needs: read its request, say what happens, turn failures into exit codes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, cast

from pydantic import ValidationError

from trainer.contract.config_io import problems_of
from trainer.contract.errors import ConfigError, DiskError, MenmaError, OutOfMemoryError
from trainer.contract.events import encode
from trainer.contract.files import DISK_ERRNOS
from trainer.contract.jobs import JOBS, REQUESTS
from trainer.contract.options import Options

INTERRUPTED = 130
MAX_LISTED = 500
"""Rows of a table in one event: an event is a line of 64 KiB at most."""


class Emit(Protocol):
    """Says what happened: an event of `contract.events`."""

    def __call__(self, kind: str, /, **fields: Any) -> None:
        """Send one event."""
        ...


class Stopped(Exception):
    """The job was asked to stop and did so in good order."""


def emit_to_stdout(kind: str, /, **fields: Any) -> None:
    """Print one event line and flush it, so that a reader sees it at once."""
    sys.stdout.write(encode(kind, **fields))
    sys.stdout.flush()


def main(arguments: Sequence[str]) -> int:
    """Run `JOB REQUEST.json` (or `-` for stdin, or nothing for an empty request)."""
    if not arguments or arguments[0] not in JOBS:
        words = f"usage: python -m trainer JOB [REQUEST.json]\njobs: {', '.join(JOBS.names)}\n"
        sys.stderr.write(words)
        return 0 if arguments and arguments[0] in {"-h", "--help"} else ConfigError.exit_code
    return run_guarded(lambda: _run_job(arguments[0], arguments[1:]), emit_to_stdout)


def run_guarded(job: Callable[[], None], emit: Emit) -> int:
    """Run `job`; return the exit code, with an `error` event and words for what people can mend."""
    try:
        job()
    except Stopped:
        return INTERRUPTED
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except Exception as error:
        known = explain(error)
        if known is None:
            raise
        return _report(known, emit)
    return 0


def explain(error: BaseException) -> MenmaError | None:
    """Return the error for people that an exception stands for; None for bugs."""
    if isinstance(error, MenmaError):
        return error
    if isinstance(error, MemoryError):
        return _host_memory(error)
    if isinstance(error, RuntimeError) and _is_device_memory(error):
        return _device_memory(error)
    if isinstance(error, OSError) and error.errno in DISK_ERRNOS and error.filename is not None:
        message = f"cannot write {error.filename}: {error.strerror}"
        return DiskError(message, hint="files written before are intact")
    return None


def _run_job(name: str, arguments: Sequence[str]) -> None:
    request = read_request(name, arguments[0] if arguments else None)
    run = cast("Callable[[Options, Emit], None]", JOBS.load(name))
    run(request, emit_to_stdout)


def read_request(name: str, source: str | None) -> Options:
    """Read and check the request of job `name`.

    Raises:
        ConfigError: the file is missing, is not JSON, or says something unknown.
    """
    try:
        if source is None:
            content: Any = {}
        else:
            text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
            content = json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the request {source}: {error}") from error
    model = REQUESTS[name]
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError(problems=problems_of(error, model)) from error


def _report(error: MenmaError, emit: Emit) -> int:
    rank = int(os.environ.get("RANK", "0"))
    if rank:  # what all ranks meet is told by rank 0; the words may still differ
        sys.stderr.write(f"rank {rank}: error: {error.message}\n")
        return error.exit_code
    with suppress(MenmaError, OSError):  # the log itself may be on the full disk
        emit("error", message=error.message[:8000], hint=error.hint, code=error.exit_code)
    sys.stderr.write(f"error: {error}\n")
    return error.exit_code


_MEMORY_HINT = (
    "to use less: memory.gradient_checkpointing = true, a smaller dataset resolution or fewer "
    "target_frames, batch_size = 1 with more training.gradient_accumulation_steps, a smaller "
    "adapter.rank, optimizer.kind = 'adamw8bit', memory.weight_format = 'bf16' or 'fp8_scaled', "
    "memory.blocks_to_swap, memory.offload_checkpoints"
)


def _is_device_memory(error: RuntimeError) -> bool:
    words = str(error).lower()
    return type(error).__name__ == "OutOfMemoryError" or (
        "out of memory" in words or "can't allocate memory" in words
    )


def _device_memory(error: RuntimeError) -> OutOfMemoryError:
    first = str(error).strip().splitlines()[0]
    return OutOfMemoryError(f"out of memory: {first}", hint=_MEMORY_HINT)


def _host_memory(error: MemoryError) -> OutOfMemoryError:
    return OutOfMemoryError(f"the host is out of memory: {error}", hint=_MEMORY_HINT)
