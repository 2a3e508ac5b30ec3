"""`menma data`: what a dataset is, before and after it is cached."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import jobs, output
from app.cli.exit_codes import ExitCode
from app.cli.options import Config, Json, Overrides, command_app

app = command_app(help="Look at a dataset: what is used, how long, how large, and how it looks.")
Decode = Annotated[
    bool,
    typer.Option(
        "--decode",
        help="Decode every frame that is trained on: finds damage that nothing else shows.",
    ),
]


@app.command()
def check(
    config: Config, overrides: Overrides = None, decode: Decode = False, as_json: Json = False
) -> None:
    """List what would be used, what is left out, and why; buckets before anything is cached.

    Needs no weight files. Exit code 2: nothing can be used, or the dataset is strict and not all
    of it can be.
    """
    report = _report(config, overrides, decode=decode, quiet=as_json)
    if as_json:
        output.json_data(report)
    else:
        _show_check(report)
    if not report["ok"]:
        raise typer.Exit(ExitCode.MISTAKE)


@app.command()
def stats(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Count clips, sizes, rates, lengths, captions, shares of sources, tokens, caches."""
    from app.render.data_report import SOURCES, source_rows, stats_rows

    report = _report(config, overrides, quiet=as_json)
    if as_json:
        output.json_data({k: v for k, v in report.items() if k not in {"clips", "problems"}})
        return
    right = "CLIPS UNUSED ITEMS REPEATS SHARE"
    output.data(output.table(SOURCES, source_rows(report), right=right))
    output.data()
    output.data(output.table(("WHAT", "FIGURES"), stats_rows(report)))
    _say_notes(report)


@app.command()
def preview(
    config: Config,
    sheet: Annotated[
        Path, typer.Option("--output", "-o", help="Contact sheet (PNG) to write.")
    ] = Path("preview.png"),
    items: Annotated[int, typer.Option(min=1, max=100, help="Items on it.")] = 12,
    frames: Annotated[int, typer.Option(min=1, max=24, help="Frames of each.")] = 6,
    match: Annotated[str, typer.Option("--match", help="Only clips with this in their name.")] = "",
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Draw items as they will be trained: window, resampling, crop and size applied.

    On a terminal with colours they are drawn there, too.
    """
    _require(config, overrides)
    with tempfile.TemporaryDirectory(prefix="menma-") as folder:
        request = {
            "config": str(config),
            "set": list(overrides or ()),
            "output": str(sheet.absolute()),
            "num_items": items,
            "num_frames": frames,
            "match": match,
            "pictures": folder if output.is_terminal() and not as_json else None,
        }
        result = jobs.run_or_leave("data_preview", request, quiet=as_json)
    if as_json:
        shown = {key: result.end.get(key) for key in ("num_items", "items")}
        warnings = [event["message"] for event in result.all("warning")]
        output.json_data({"output": str(sheet), **shown, "warnings": warnings})
    else:
        output.say(f"{len(result.end['items'])} of {result.end['num_items']} items")


@app.command()
def latents(
    config: Config,
    z_limit: Annotated[
        float,
        typer.Option(
            "--z-limit", min=0.1, help="Items further than this from the others' mean stand out."
        ),
    ] = 3.5,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Look for cached latents that are damaged, NaN, near constant, or unlike the others.

    Exit code 1: something is NaN, infinite or damaged.
    """
    report = _ask("data_latents", config, overrides, {"z_limit": z_limit}, quiet=as_json)
    if as_json:
        output.json_data(report)
    else:
        _show_latents(report)
    if report["not_finite"] or report["damaged"] or report["captions_not_finite"]:
        raise typer.Exit(ExitCode.FAILED)


def _report(
    config: Path, overrides: Sequence[str] | None, *, decode: bool = False, quiet: bool
) -> dict[str, Any]:
    return _ask("data_check", config, overrides, {"decode": decode}, quiet=quiet)


def _ask(
    job: str,
    config: Path,
    overrides: Sequence[str] | None,
    options: Mapping[str, Any],
    *,
    quiet: bool,
) -> dict[str, Any]:
    """Return the report that a job writes; end the command with its exit code when it fails."""
    _require(config, overrides)
    with tempfile.TemporaryDirectory(prefix="menma-") as folder:
        file = Path(folder) / "report.json"
        request = {"config": str(config), "set": list(overrides or ()), "output": str(file)}
        jobs.run_or_leave(job, {**request, **options}, quiet=quiet)
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return report


def _require(config: Path, overrides: Sequence[str] | None) -> None:
    """Say what is wrong with the config, before torch is loaded."""
    from trainer.contract.config_io import load_config

    load_config(config, overrides or ())


def _show_check(report: Mapping[str, Any]) -> None:
    from app.render.data_report import BUCKETS, bucket_rows, summary

    if report["buckets"]:
        output.data(output.table(BUCKETS, bucket_rows(report), right=" ".join(BUCKETS[1:])))
    left_out = [(clip["path"], _why(clip)) for clip in report["clips"] if not clip["used"]]
    if left_out:
        output.data()
        output.data(output.table(("LEFT OUT", "WHY"), left_out))
    doubts = [(c["path"], words) for c in report["clips"] for words in c["warnings"]]
    if doubts:
        output.data()
        output.data(output.table(("USED", "WARNING"), doubts))
    _say_notes(report)
    output.say(f"{summary(report)}.")
    if not report["ok"]:
        why = "the dataset is strict" if report["counts"]["clips"] else "no clip can be used"
        output.say(f"error: caching would stop: {why}")


def _why(clip: Mapping[str, Any]) -> str:
    place = f"line {clip['line']}: " if clip["line"] else ""
    hint = f" ({clip['hint']})" if clip["hint"] else ""
    return f"{place}{clip['problem']}{hint}"


def _say_notes(report: Mapping[str, Any]) -> None:
    for note in report["notes"]:
        output.say(note)
    for source in report["sources"]:
        if source["cache"]["detail"]:
            output.say(f"{source['media']}: {source['cache']['detail']}")


def _show_latents(report: Mapping[str, Any]) -> None:
    rows = [(row["name"], found) for row in report["items"] for found in row["findings"]]
    rows += [(row["name"], row["message"]) for row in report["damaged"]]
    rows += [(name, "its encoded caption is not finite") for name in report["captions_not_finite"]]
    if rows:
        output.data(output.table(("ITEM", "FINDING"), rows))
    channels = report["channels"]
    means, stds = ([channel[key] for channel in channels] for key in ("mean", "std"))
    output.say(
        f"{report['num_items']} items: mean {report['mean']:.3f}, standard deviation "
        f"{report['std']:.3f} (the VAE's own data: 0 and 1). Of its {len(channels)} channels: "
        f"means {min(means):.2f} to {max(means):.2f}, deviations {min(stds):.2f} to "
        f"{max(stds):.2f}."
    )
    count = report["outliers"]
    output.say("No item stands out." if not count else f"{count} items stand out.")
