"""One spelling for one thing: what Menma defines is not named as other trainers name it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SPEAKS_FOREIGN = ("trainer/io/formats/", "trainer/adapters/formats/", "app/domain/importing/")
"""Folders that read and write other programs' spellings."""

BANNED = {
    "activation_checkpointing": "gradient_checkpointing",
    "cfg_scale": "guidance_scale",
    "criterion": "loss",
    "denoised": "clean_estimate",
    "denoiser": "transformer",
    "discrete_flow_shift": "flow_shift",
    "dit": "transformer",
    "encoder_hidden_states": "context",
    "epsilon": "noise",
    "fp8_base": "weight_format",
    "frame_num": "num_frames",
    "global_step": "step",
    "gt": "target",
    "guide_scale": "guidance_scale",
    "lora_alpha": "alpha",
    "lowvram": "offload, with an object",
    "mixed_precision": "weight_format or compute_dtype",
    "model_output": "prediction",
    "model_pred": "prediction",
    "multiplier": "strength",
    "network_alpha": "alpha",
    "network_dim": "rank",
    "noisy_model_input": "noisy_latents",
    "offload_blocks": "blocks_to_swap",
    "prompt_embeds": "context",
    "sample_shift": "flow_shift",
    "timestep_boundary": "expert_boundary",
    "timestep_sampling": "timestep_sampler",
    "timestep_shift": "flow_shift",
    "train_batch_size": "batch_size",
    "unet": "transformer",
    "weighting_scheme": "weighting",
    "x0": "latents",
    "x0_pred": "clean_estimate",
    "xt": "noisy_latents",
}
EMPTY_MODULE_NAMES = {"utils", "util", "helper", "helpers", "manager", "common", "misc", "info"}


def defined_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield what a file names itself: functions, classes, arguments, variables, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def offences(source: str, path: str) -> list[str]:
    """Return a line for each name that the glossary spells otherwise."""
    return [
        f"{path}:{line}: {name} -> {BANNED[name]}"
        for name, line in defined_names(ast.parse(source))
        if name in BANNED
    ]


def sources() -> Iterator[tuple[str, str]]:
    """Yield path and text of each file the glossary binds."""
    for top in ("app", "trainer"):
        for path in sorted((ROOT / top).rglob("*.py")):
            relative = path.relative_to(ROOT).as_posix()
            if not relative.startswith(SPEAKS_FOREIGN):
                yield relative, path.read_text(encoding="utf-8")


def test_names_follow_the_glossary():
    assert [line for path, text in sources() for line in offences(text, path)] == []


def test_an_offence_would_be_seen():
    assert set(offences("def f(dit): ...\nself.x0 = 1\n", "f.py")) == {
        "f.py:1: dit -> transformer",
        "f.py:2: x0 -> latents",
    }


def test_no_module_has_an_empty_name():
    names = {path: set(Path(path).with_suffix("").parts) for path, _ in sources()}
    assert {path for path, parts in names.items() if parts & EMPTY_MODULE_NAMES} == set()
