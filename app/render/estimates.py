"""An estimate in words and rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from app.runs.durations import duration
from trainer.contract.memory_model import Estimate, Fit, JobCost, automatic_words

GIB = 2**30
SMALLEST_SHOWN = GIB // 20
"""Smaller parts of RAM are in the JSON only."""
_VERDICTS = {
    "fits": "it fits",
    "tight": "tight: without the margin it fits",
    "does not fit": "it does not fit",
    "unknown": "",
}


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
    return f"Peak: {peak}. {has}: {_VERDICTS[result.verdict]}."


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
        shares = _shares(result.step_parts)
        yield f"An update takes about {seconds(result.step_seconds)}{shares}."
    yield from _job_times(result)
    yield from _host_lines(result)
    disk = ", ".join(f"{name} {_size(size)}" for name, size in result.disk_parts.items())
    yield f"Disk: {disk}."


def _job_times(result: Estimate) -> Iterator[str]:
    """Yield how long caching and sampling take, where the GPU's arithmetic is known."""
    if caching := result.jobs.get("caching"):
        parts = dict(caching.item_s)
        caption = parts.pop("caption", None)
        if caption is not None:
            yield (
                f"Caching a clip of {caching.clip} takes about {seconds(sum(parts.values()))} "
                f"({_listed_seconds(parts)}), a caption {seconds(caption)}, loading "
                f"{seconds(sum(caching.once_s.values()))}."
            )
    if (sampling := result.jobs.get("sampling")) and sampling.total_s is not None:
        yield (
            f"`menma sample` takes about {seconds(sampling.total_s)}: {_videos(sampling)} of "
            f"{seconds(sum(sampling.item_s.values()))}{_shares(sampling.item_s)}, and before "
            f"that {_listed_seconds(sampling.once_s)}."
        )
    if (samples := result.jobs.get("samples")) and samples.total_s is not None:
        yield (
            f"Samples of the run take about {seconds(samples.total_s)} each time, "
            f"{samples.rounds} times: {seconds(samples.rounds * samples.total_s)}."
        )


def _videos(job: JobCost) -> str:
    many = f"{job.items} videos, the longest" if job.items != 1 else "a video"
    up_to = "up to " if job.at_most else ""
    return f"{many} of {job.clip} and {up_to}{job.num_forwards} passes,"


def _host_lines(result: Estimate) -> Iterator[str]:
    """Yield the RAM of each job, and whether the machine has it."""
    yield f"Host memory while training: {_parts(result.host_bytes, result.host_parts)}."
    for name, job in result.jobs.items():
        if job.host_phases:
            parts = _parts(job.host_bytes, job.host_parts, f"{job.host_phase}: ")
            yield f"Host memory while {name}: {parts}."
    if result.machine_bytes is not None:
        most = max(result.host_peaks, key=lambda name: result.host_peaks[name])
        yield (
            f"RAM: {gib(result.machine_bytes)} GiB; {most} takes "
            f"{gib(result.host_peaks[most])} (± {gib(result.host_margin_bytes)}): "
            f"{_VERDICTS[result.host_verdict]}."
        )


def _parts(total: int, parts: Mapping[str, int], head: str = "") -> str:
    large = {name: size for name, size in parts.items() if size >= SMALLEST_SHOWN}
    listed = ", ".join(f"{name} {gib(size)}" for name, size in large.items())
    return f"{gib(total)} GiB ({head}{listed})"


def _listed_seconds(parts: Mapping[str, float]) -> str:
    least = 0.01 * sum(parts.values())
    return ", ".join(f"{name} {seconds(value)}" for name, value in parts.items() if value > least)


def caching_line(value: float, gpu: str) -> str:
    """Say how long caching a dataset takes."""
    return f"Caching all training clips takes about {seconds(value)} on {gpu}."


def sampling_line(value: float, gpu: str, *, at_most: bool = False) -> str:
    """Say how long sampling takes; at most: a step cache will spare some of it."""
    if at_most:
        return (
            f"By the estimate this takes up to {seconds(value)} on {gpu}; the step cache spares "
            "some of it, about half at its defaults."
        )
    return f"By the estimate this takes about {seconds(value)} on {gpu}."


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
    """Write seconds, with two digits that mean something; minutes, hours where there are many."""
    if value >= 120:
        return duration(value)
    if value < 0.1:
        return f"{1000 * value:.2g} ms"
    return f"{value:.0f} s" if value >= 10 else f"{value:.2g} s"


def _shares(parts: Mapping[str, float]) -> str:
    total = sum(parts.values())
    largest = sorted(parts.items(), key=lambda item: -item[1])[:3]
    shares = ", ".join(f"{name} {100 * value / total:.0f} %" for name, value in largest)
    return f" ({shares})"


def _size(size: int) -> str:
    return f"{gib(size)} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _quoted(text: str) -> str:
    return f"'{text}'" if '"' in text else text
