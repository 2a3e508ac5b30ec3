"""Weights and optimizer state of an engine as files: safetensors only, no pickle.

An engine holds its trained parameters as flat fp32 tensors ("flats"), each with the optimizer's
state, and knows which stretch of which parameter lies where ("pieces"). Every rank writes the
pieces that are its own into `rank-00000.safetensors`, keyed `kind|start|name`, so that

* nothing is gathered: saving needs no extra memory and is parallel over ranks;
* any engine, number of processes or ZeRO stage can read any other's file by cutting anew.

Optimizers whose state is not one value an element (8-bit ones) are stored as they lie in memory,
keyed `raw|flat|key`; those fit the same engine, number of processes and stage only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.contract.errors import DiskError, ModelFileError
from trainer.contract.files import write_json
from trainer.engine.optimizer_groups import Counters
from trainer.engine.running_average import RunningAverage
from trainer.io.atomic_save import save_safetensors
from trainer.io.mapped_load import WeightFiles, open_weights, read_json
from trainer.io.stream_save import TensorSlot, stream_safetensors

FORMAT = 1
_INFO = "engine.json"
_WEIGHT = "weight"
_AVERAGE = "average"
_PATH = "/"
"""Between the keys of state that is nested."""


@dataclass(frozen=True, slots=True)
class Piece:
    """`numel` elements of parameter `name` from `start`, at `offset` in flat number `flat`."""

    name: str
    start: int
    numel: int
    flat: int
    offset: int


def always_there(index: int, changed: bool) -> AbstractContextManager[None]:
    """Say that flat `index` and its state are in memory all the time."""
    return nullcontext()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """An engine's trained weights and optimizer state, as it holds them on this rank."""

    engine: str
    world_size: int
    zero_stage: int
    rank: int
    shapes: dict[str, tuple[int, ...]]
    """Every trained parameter, whole, in a fixed order."""
    flats: Sequence[Tensor]
    """What the inner optimizer updates, float32; its state is keyed by these."""
    pieces: Sequence[Piece]
    own: bool
    """Whether this rank writes its pieces (replicas are written once)."""
    optimizer: torch.optim.Optimizer
    state_names: tuple[str, ...]
    inner_step: Callable[[], None]
    """Let the inner optimizer step over `flats` as their `grad` says."""
    resident: Callable[[int, bool], AbstractContextManager[None]] = always_there
    """Have a flat and its state in memory for the duration of a block; True: keep its changes."""
    grouped: Callable[[], AbstractContextManager[None]] = nullcontext
    """Have the flats in the inner optimizer's groups for the duration of a block."""
    counters: Counters = field(default_factory=lambda: Counters([]))
    """What the inner optimizer counts for a group of parameters."""
    average: RunningAverage | None = None
    """Of the flats."""

    @property
    def kept_beside(self) -> dict[str, Sequence[Tensor]]:
        """What there is of each flat besides the optimizer's state, by its name in files."""
        return {} if self.average is None else {_AVERAGE: self.average.tensors}

    @property
    def layout(self) -> dict[str, Any]:
        """What raw optimizer state depends on."""
        return {
            "engine": self.engine,
            "world_size": self.world_size,
            "zero_stage": self.zero_stage,
            "optimizer": type(self.optimizer).__name__,
        }


def save(state: EngineState, folder: Path) -> None:
    """Write this rank's part of `state` into `folder`. No communication.

    Raises:
        DiskError: the disk is full, read-only or gone.
    """
    if state.rank == 0:
        parameters = {name: list(shape) for name, shape in state.shapes.items()}
        info = {
            "format": FORMAT,
            **state.layout,
            "state_names": list(state.state_names),
            "groups": state.counters.values(),
            "parameters": parameters,
        }
        if state.average is not None:
            info["average"] = {"steps": state.average.steps, "updates": state.average.updates}
        write_json(folder / _INFO, info)
    if not state.own:
        return
    # The checkpoint's manifest holds a digest of the file, so reading it back here is not needed.
    path = _rank_file(folder, state.rank)
    if state.state_names:
        _stream_pieces(state, path)
        return
    tensors = {_key(_WEIGHT, piece): cut(state.flats[piece.flat], piece) for piece in state.pieces}
    for kind, beside in state.kept_beside.items():
        tensors |= {_key(kind, piece): cut(beside[piece.flat], piece) for piece in state.pieces}
    raw, numbers = _raw_state(state)
    save_safetensors(tensors | raw, path, {"numbers": json.dumps(numbers)}, verify=False)


def load(state: EngineState, folder: Path) -> None:
    """Fill `state` from what `save` wrote, whoever wrote it. No communication.

    Raises:
        ModelFileError: damaged, of another set of trained parameters, or of an optimizer whose
            state cannot be cut anew. Nothing is changed then.
    """
    info = _read_info(state, folder)
    if state.state_names:
        files = [_RankFile(path) for path in _rank_files(folder)]
        pieces = _index(files)
        stepped = any(kind not in {_WEIGHT, _AVERAGE} for kind, _ in pieces)
        _check_cover(state, pieces, (_WEIGHT, *(state.state_names if stepped else ())), folder)
        numbers = _merged_numbers(files)
        if not stepped and state.resident is always_there:
            state.optimizer.state.clear()  # from before the first step
        filled = stepped or bool(state.optimizer.state)
        if filled:
            _create_state(state)
        with ExitStack() as stack:
            residence = _Residence(state, stack, changed=True)
            for piece in pieces_by_flat(state):
                residence.bring(piece.flat)
                _fill_weight(state, piece, pieces)
                if filled:
                    _fill_state(state, piece, pieces, numbers)
                _fill_average(state, piece, pieces)
    else:
        own = _rank_file(folder, state.rank if _writers(info) > 1 else 0)
        _check_layout(state, info, folder)
        file = _RankFile(own)
        pieces = _index([file])
        _check_cover(state, pieces, (_WEIGHT,), folder)
        _fill_raw(state, file)
        for piece in state.pieces:
            _fill_weight(state, piece, pieces)
            _fill_average(state, piece, pieces)
    state.counters.restore(info.get("groups", []), state.flats[0].device if state.flats else None)
    if state.average is not None:
        found = info.get("average", {})
        state.average.steps = int(found.get("steps", 0))
        state.average.updates = int(found.get("updates", 0))


def save_parts(folder: Path, parts: Sequence[str], step: int) -> None:
    """Say in `folder` that its sub-folders `parts` hold a state each, written by `save`.

    One process calls it, after its own `save` of every part.

    Args:
        folder: of the checkpoint.
        parts: names of the sub-folders.
        step: steps made so far, of all parts together.
    """
    layout = read_layout(folder / parts[0])
    write_json(folder / _INFO, {"format": FORMAT, **layout, "parts": list(parts), "step": step})


def read_parts(folder: Path) -> tuple[tuple[str, ...], int]:
    """Return what `save_parts` wrote: the parts, and the step.

    Raises:
        ModelFileError: nothing was written there, or a state that has no parts.
    """
    info = read_json(folder / _INFO)
    if "parts" not in info:
        raise ModelFileError(
            f"{folder} holds one set of trained parameters, and this run trains two in turns",
            hint="resume with the model.expert that it was written with, or start anew with "
            "--resume never",
        )
    return tuple(info["parts"]), int(info["step"])


def read_layout(folder: Path) -> dict[str, Any]:
    """Return {"engine", "world_size", "zero_stage"} of what `save` wrote into `folder`.

    Raises:
        ModelFileError: nothing was written there, or not by an engine.
    """
    info = read_json(folder / _INFO)
    return {key: info[key] for key in ("engine", "world_size", "zero_stage")}


def await_parts(folder: Path, within_s: float = 90.0) -> None:
    """Wait until this machine sees the part of every rank in `folder`, after all have written it.

    A network file system may list for up to a minute what the folder held before.

    Raises:
        DiskError: a part did not appear within `within_s` seconds; names it.
    """
    info = read_json(folder / _INFO)
    if "parts" in info:
        for part in info["parts"]:
            await_parts(folder / part, within_s)
        return
    wanted = [_rank_file(folder, rank) for rank in range(_writers(info)) if _writers(info) > 1]
    deadline = time.monotonic() + within_s
    while missing := sorted(set(wanted) - set(_rank_files(folder))):
        if time.monotonic() > deadline:
            raise DiskError(
                f"{missing[0]} was written and is not to be seen on this machine",
                hint="all machines must share the run directory; earlier checkpoints are intact",
            )
        time.sleep(0.2)


class _RankFile:
    """One rank's file, opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weights: WeightFiles = open_weights(path)
        try:
            self.numbers: dict[str, Any] = json.loads(self.weights.metadata["numbers"])
        except (KeyError, ValueError) as error:
            raise ModelFileError(f"{path} is not a part of a checkpoint: {error}") from error


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a stretch of a parameter is found."""

    file: _RankFile
    key: str
    start: int
    numel: int


_Index = dict[tuple[str, str], list[_Source]]


def _index(files: list[_RankFile]) -> _Index:
    found: _Index = {}
    for file in files:
        for key, info in file.weights.items():
            kind, start, name = _split(file.path, key)
            source = _Source(file, key, start, info.shape[0] if info.shape else 0)
            found.setdefault((kind, name), []).append(source)
    return found


def _key(kind: str, piece: Piece) -> str:
    return f"{kind}|{piece.start}|{piece.name}"


def _split(path: Path, key: str) -> tuple[str, int, str]:
    parts = key.split("|", 2)
    if len(parts) != 3 or not parts[1].isdecimal():
        raise ModelFileError(f"{path} holds {key!r}, which is no part of a checkpoint")
    return parts[0], int(parts[1]), parts[2]


def cut(flat: Tensor, piece: Piece) -> Tensor:
    """Return a piece of its flat, or of a state tensor that is laid out alike, as a view."""
    return flat.detach().view(-1).narrow(0, piece.offset, piece.numel)


def state_of(state: EngineState, flat: Tensor) -> dict[str, Any]:
    """Return what the optimizer holds of a flat; nothing before its first step."""
    held: dict[str, Any] = state.optimizer.state.get(flat, {})
    return held


class _Residence:
    """Brings one flat after the other into memory."""

    def __init__(self, state: EngineState, stack: ExitStack, *, changed: bool) -> None:
        self._state, self._held = state, stack.enter_context(ExitStack())
        self._changed = changed
        self._index: int | None = None

    def bring(self, index: int) -> None:
        """Have flat `index` in memory until another one is asked for."""
        if index != self._index:
            self._index = None
            self._held.close()
            self._held.enter_context(self._state.resident(index, self._changed))
            self._index = index


def pieces_by_flat(state: EngineState) -> list[Piece]:
    """Return this rank's pieces, those of one flat after the other."""
    return sorted(state.pieces, key=lambda piece: piece.flat)


def _stream_pieces(state: EngineState, path: Path) -> None:
    """Write piece after piece: a copy of all of them may be more than the memory holds."""
    found: dict[str, tuple[Piece, str]] = {}
    beside = state.kept_beside
    for piece in pieces_by_flat(state):
        stepped = bool(state_of(state, state.flats[piece.flat]))
        for kind in (_WEIGHT, *(state.state_names if stepped else ()), *beside):
            found[_key(kind, piece)] = (piece, kind)
    with ExitStack() as stack:
        residence = _Residence(state, stack, changed=False)

        def read(key: str) -> Tensor:
            piece, kind = found[key]
            if kind in beside:
                return cut(beside[kind][piece.flat], piece)
            residence.bring(piece.flat)
            flat = state.flats[piece.flat]
            return cut(flat if kind == _WEIGHT else state_of(state, flat)[kind], piece)

        slots = {
            key: TensorSlot((piece.numel,), torch.float32) for key, (piece, _) in found.items()
        }
        numbers = {"numbers": json.dumps(_step_numbers(state))}
        stream_safetensors(slots, read, path, numbers, in_order=True, verify=False)


def _step_numbers(state: EngineState) -> dict[str, dict[str, float]]:
    """Return what the optimizer counts, such as its steps, by parameter."""
    return {
        piece.name: {
            key: float(value)
            for key, value in state_of(state, state.flats[piece.flat]).items()
            if key not in state.state_names
        }
        for piece in state.pieces
    }


def _raw_state(state: EngineState) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, flat in enumerate(state.flats):
        leaves = dict(_leaves(state_of(state, flat)))
        numbers[str(index)] = {k: v for k, v in leaves.items() if not isinstance(v, Tensor)}
        tensors |= {f"raw|{index}|{k}": v for k, v in leaves.items() if isinstance(v, Tensor)}
    return tensors, numbers


def _leaves(held: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what nested state holds, by its path."""
    if isinstance(held, dict):
        inside: Iterable[tuple[str, Any]] = ((str(key), value) for key, value in held.items())
    elif isinstance(held, list):
        inside = ((str(index), value) for index, value in enumerate(held))
    else:
        yield path, held
        return
    for key, value in inside:
        yield from _leaves(value, f"{path}{_PATH}{key}" if path else key)


def _fill_weight(state: EngineState, piece: Piece, pieces: _Index) -> None:
    _copy(cut(state.flats[piece.flat], piece), piece, pieces[_WEIGHT, piece.name])


def _fill_average(state: EngineState, piece: Piece, pieces: _Index) -> None:
    for kind, beside in state.kept_beside.items():
        # One that was not kept starts from the weights.
        sources = pieces.get((kind, piece.name)) or pieces[_WEIGHT, piece.name]
        _copy(cut(beside[piece.flat], piece), piece, sources)


def _fill_state(
    state: EngineState, piece: Piece, pieces: _Index, numbers: dict[str, dict[str, float]]
) -> None:
    held = state_of(state, state.flats[piece.flat])
    for name in state.state_names:
        target = cut(held[name], piece).zero_()
        _copy(target, piece, pieces.get((name, piece.name), []))
    for key in held.keys() - set(state.state_names):
        _set_number(held, key, numbers[piece.name].get(key, 0.0))


def _fill_raw(state: EngineState, file: _RankFile) -> None:
    saved_any = any(file.numbers.values()) or any(key.startswith("raw|") for key in file.weights)
    if not saved_any:
        state.optimizer.state.clear()  # from before the first step
        return
    _create_state(state)
    copies: list[tuple[Tensor, Tensor]] = []
    for index, flat in enumerate(state.flats):
        held, known = state_of(state, flat), file.numbers[str(index)]
        for path, value in list(_leaves(held)):
            if isinstance(value, Tensor):
                copies.append((value, _raw_tensor(file, f"raw|{index}|{path}", value)))
            elif path in known:
                _set_leaf(held, path, known[path])
    for target, saved in copies:
        target.copy_(saved)


def _set_leaf(held: Any, path: str, value: Any) -> None:
    *parents, last = path.split(_PATH)
    for key in parents:
        held = held[int(key)] if isinstance(held, list) else held[key]
    held[int(last) if isinstance(held, list) else last] = value


def _raw_tensor(file: _RankFile, key: str, wanted: Tensor) -> Tensor:
    info = file.weights.get(key)
    if info is None or info.shape != tuple(wanted.shape) or info.dtype != wanted.dtype:
        saved = "missing" if info is None else f"{info.shape} {info.dtype}"
        raise ModelFileError(
            f"{file.path}: {key} is {saved}, the optimizer now needs "
            f"{tuple(wanted.shape)} {wanted.dtype}",
            hint="resume with the optimizer's settings the checkpoint was written with",
        )
    return file.weights.read(key)


def _create_state(state: EngineState) -> None:
    """Let the optimizer lay out its own state: a step of size 0 over gradients of 0."""
    groups = state.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0
    buffers = [flat.grad for flat in state.flats]  # DeepSpeed's own, where it offloads
    for flat in state.flats:
        flat.grad = torch.zeros_like(flat) if flat.grad is None else flat.grad.zero_()
    state.inner_step()
    for flat, buffer in zip(state.flats, buffers, strict=True):
        flat.grad = buffer
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


def _set_number(held: dict[str, Any], key: str, value: float) -> None:
    if isinstance(held[key], Tensor):
        held[key].fill_(value)
    else:
        held[key] = type(held[key])(value)


def _copy(target: Tensor, piece: Piece, sources: list[_Source]) -> None:
    end = piece.start + piece.numel
    for source in sources:
        low, high = max(piece.start, source.start), min(end, source.start + source.numel)
        if low < high:
            stretch = source.file.weights.read(source.key).narrow(0, low - source.start, high - low)
            target.narrow(0, low - piece.start, high - low).copy_(stretch)


def _read_info(state: EngineState, folder: Path) -> dict[str, Any]:
    path = folder / _INFO
    if not path.is_file():
        raise ModelFileError(f"{path} is missing", hint="choose another checkpoint to resume from")
    info = read_json(path)
    if info.get("format") != FORMAT:
        raise ModelFileError(
            f"{path} has format {info.get('format')}, this version reads {FORMAT}",
            hint="resume with the version of Menma that wrote the checkpoint",
        )
    saved = {name: tuple(shape) for name, shape in info["parameters"].items()}
    if saved != state.shapes:
        wanted = state.shapes
        differing = [name for name in saved | wanted if saved.get(name) != wanted.get(name)]
        raise ModelFileError(
            f"{folder} holds other trained parameters than this run: {len(differing)} differ, "
            f"e.g. {_describe(differing[0], saved, wanted)}",
            hint="resume with the adapter settings the checkpoint was written with, or start "
            "anew with --resume never",
        )
    if bool(info.get("state_names")) != bool(state.state_names) or (
        state.state_names and tuple(info["state_names"]) != state.state_names
    ):
        raise ModelFileError(
            f"{folder} holds the state of {info.get('optimizer')}, "
            f"this run uses {type(state.optimizer).__name__}",
            hint="resume with the optimizer the checkpoint was written with",
        )
    return info


def _describe(
    name: str, saved: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
) -> str:
    if name not in saved:
        return f"{name} is not in it"
    if name not in wanted:
        return f"{name} is not trained now"
    return f"{name} is {saved[name]} in it and {wanted[name]} now"


def _check_layout(state: EngineState, info: dict[str, Any], folder: Path) -> None:
    differing = {
        key: (info.get(key), value) for key, value in state.layout.items() if info.get(key) != value
    }
    if differing:
        words = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in differing.items())
        raise ModelFileError(
            f"the state of {type(state.optimizer).__name__} in {folder} fits only the layout it "
            f"was written with ({words})",
            hint="resume with the same engine, zero_stage and number of processes, or use an "
            "optimizer whose state can be cut anew (adamw)",
        )


def _check_cover(state: EngineState, pieces: _Index, kinds: Sequence[str], folder: Path) -> None:
    for kind in kinds:
        for piece in state.pieces:
            sources = pieces.get((kind, piece.name), [])
            if not _covered(piece, sources):
                raise ModelFileError(
                    f"{folder} lacks a part of {kind} of {piece.name}",
                    hint="the checkpoint is incomplete; resume from another one",
                )


def _covered(piece: Piece, sources: list[_Source]) -> bool:
    reached = piece.start
    for source in sorted(sources, key=lambda found: found.start):
        if source.start > reached:
            break
        reached = max(reached, source.start + source.numel)
    return reached >= piece.start + piece.numel


def _merged_numbers(files: list[_RankFile]) -> dict[str, dict[str, float]]:
    merged: dict[str, dict[str, float]] = {}
    for file in files:
        for name, numbers in file.numbers.items():
            merged.setdefault(name, {}).update(numbers)
    return merged


def _writers(info: dict[str, Any]) -> int:
    return int(info["world_size"]) if info["zero_stage"] else 1


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.safetensors"


def _rank_files(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("rank-*.safetensors"))
