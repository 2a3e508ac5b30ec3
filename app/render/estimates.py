"""An estimate in words and rows."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.contract.memory_model import Estimate, Fit, automatic_words

GIB = 2**30


def rows(result: Estimate) -> Iterator[tuple[str, str, str]]:
    """Yield the table: phase, part, GiB; the sum of a phase first, its largest part next."""
    for phase in result.phases:
        yield phase.name, "", gib(phase.peak_bytes)
        parts = sorted(phase.parts.items(), key=lambda item: -item[1])
        for part, size in parts:
            yield "", part, gib(size)


def verdict_line(result: Estimate) -> str:
    """Say whether it fits, with the margin."""
    peak = f"{gib(result.peak_bytes)} GiB (± {gib(result.margin_bytes)}), {result.deciding.name}"
    if result.gpu is None:
        return f"Peak: {peak}."
    has = f"{result.gpu.name} has {result.gpu.memory_gib:.1f} GiB"
    words = {
        "fits": "it fits",
        "tight": "tight: without the margin it fits",
        "does not fit": "it does not fit",
        "unknown": "",
    }
    return f"Peak: {peak}. {has}: {words[result.verdict]}."


def summary(result: Estimate) -> Iterator[str]:
    """Yield what follows the table: verdict, time, host memory, disk."""
    clips = f"{result.clip}, batch {result.clip.batch}, {result.tokens:,} tokens a clip"
    yield f"{result.variant}, largest batch {clips}."
    if result.turns is not None:
        yield f"Experts: {result.turns.in_words(0)}."
    yield from automatic_lines(result)
    yield verdict_line(result)
    if result.measured_runs:
        yield (
            f"Corrected by {result.measured_runs} earlier runs on this machine: "
            f"x {result.correction:.2f}."
        )
    if result.step_seconds is not None:
        yield f"An update takes about {seconds(result.step_seconds)}{_shares(result)}."
    host = ", ".join(f"{name} {gib(size)}" for name, size in result.host_parts.items())
    yield f"Host memory while training: {gib(result.host_bytes)} GiB ({host})."
    disk = ", ".join(f"{name} {_size(size)}" for name, size in result.disk_parts.items())
    yield f"Disk: {disk}."


def automatic_lines(result: Estimate) -> Iterator[str]:
    """Yield what `auto` became for this GPU, if anything was."""
    if result.automatic and result.gpu is not None:
        yield f"For {result.gpu.name}: {automatic_words(result.automatic, result.num_blocks)}."


def fit_lines(fit: Fit) -> Iterator[str]:
    """Yield what was changed, what each change costs, and the options that make it."""
    if not fit.changes and fit.found:
        yield "Nothing has to be changed: it fits, and no setting makes it faster."
        return
    peak, time, host = fit.before.peak_bytes, fit.before.step_seconds, fit.before.host_bytes
    for change in fit.changes:
        moved = f"{gib(peak)} -> {gib(change.peak_bytes)} GiB"
        if change.step_seconds is not None and time is not None:
            moved += f", {seconds(time)} -> {seconds(change.step_seconds)} an update"
        if abs(change.host_bytes - host) > 0.05 * GIB:
            moved += f", RAM {gib(host)} -> {gib(change.host_bytes)} GiB"
        yield f"  {change.override}: {moved}{'' if change.exact else '; less exact'}"
        peak, time, host = change.peak_bytes, change.step_seconds, change.host_bytes
    if not fit.found:
        short = fit.after.only(*fit.phases).deciding
        yield (
            f"No settings fit with the margin: {short.name} needs {gib(short.peak_bytes)} GiB. "
            "Smaller clips (resolution, target_frames, batch_size of the dataset) need less."
        )
        return
    yield "Use: " + " ".join(f"--set {_quoted(change.override)}" for change in fit.changes)
    if fit.after.verdict != "fits":
        needs = gib(fit.after.phase("sampling").peak_bytes)
        yield f"`menma sample` of the whole model takes {needs} GiB: more than this GPU has."


def gib(size: float) -> str:
    """Write bytes in GiB."""
    return f"{size / GIB:.1f}" if size >= 0.05 * GIB or not size else f"{size / GIB:.2f}"


def seconds(value: float) -> str:
    """Write seconds, with two digits that mean something."""
    return f"{value:.0f} s" if value >= 10 else f"{value:.2g} s"


def _shares(result: Estimate) -> str:
    total = sum(result.step_parts.values())
    largest = sorted(result.step_parts.items(), key=lambda item: -item[1])[:3]
    shares = ", ".join(f"{name} {100 * value / total:.0f} %" for name, value in largest)
    return f" ({shares})"


def _size(size: int) -> str:
    return f"{gib(size)} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _quoted(text: str) -> str:
    return f"'{text}'" if '"' in text else text
