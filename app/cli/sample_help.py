"""The help of `menma sample`: its many options under headings, not in one list."""

from __future__ import annotations

from typing import Any

from app.cli.loraid_options import LoraidCommand

SECTIONS: dict[str, tuple[str, ...]] = {
    "What to show": (
        *("prompts", "prompts_file", "negative_prompt", "wildcards", "wildcards_folder"),
        *("width", "height", "frames", "fps", "seed"),
    ),
    "What it starts from": (
        *("image", "last_image", "control", "video", "strength"),
        *("one_frame", "control_images", "like"),
    ),
    "Steps": ("steps", "solver", "schedule", "shift"),
    "Guidance": (
        *("guidance", "guidance_high_noise", "cfg_skip_mode", "cfg_apply_ratio"),
        *("cfg_zero_star", "cfg_zero_init_steps", "guidance_rescale"),
        *("slg_layers", "slg_mode", "slg_scale", "slg_start", "slg_end"),
    ),
    "LoRAs": ("loras", "merge_loras", "loraids", "loraid_strengths", "loraid_from"),
    "Speed": (
        *("cfg_batch", "step_cache", "step_cache_threshold", "step_cache_start"),
        *("step_cache_max_skips", "step_cache_retention", "step_cache_file", "calibrate"),
    ),
    "Files": (
        *("target", "format_", "quality", "save_latents", "no_metadata", "force", "decode"),
        "preview",
    ),
    "Sheets and sessions": ("vary", "matrix", "columns", "interactive"),
}
"""Heading -> parameters of `menma sample`, in the order of its help."""
_REST = "Other options"


class SampleCommand(LoraidCommand):
    """`menma sample`: its help has a heading for each kind of options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options; what has no heading of its own comes last."""
        heading_of = {name: heading for heading, names in SECTIONS.items() for name in names}
        order = [name for names in SECTIONS.values() for name in names]
        lists: dict[str, dict[str, tuple[str, str]]] = {
            heading: {} for heading in ("Arguments", *SECTIONS, _REST)
        }
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                is_argument = parameter.param_type_name == "argument"
                heading = "Arguments" if is_argument else heading_of.get(parameter.name, _REST)
                lists[heading][parameter.name] = record
        for heading, records in lists.items():
            names = sorted(records, key=lambda name: order.index(name) if name in order else 0)
            if names:
                with formatter.section(heading):
                    formatter.write_dl([records[name] for name in names])
