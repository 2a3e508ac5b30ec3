"""Files of a run on the Hugging Face hub, with a page that says what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.contract.errors import RunError
from trainer.contract.safetensors_header import metadata_of, read_header

BASES = {
    "wan2.1-t2v-1.3b": "Wan-AI/Wan2.1-T2V-1.3B",
    "wan2.1-t2v-14b": "Wan-AI/Wan2.1-T2V-14B",
    "wan2.1-i2v-14b": "Wan-AI/Wan2.1-I2V-14B-720P",
    "wan2.1-flf2v-14b": "Wan-AI/Wan2.1-FLF2V-14B-720P",
    "wan2.2-t2v-a14b": "Wan-AI/Wan2.2-T2V-A14B",
    "wan2.2-i2v-a14b": "Wan-AI/Wan2.2-I2V-A14B",
    "wan2.2-ti2v-5b": "Wan-AI/Wan2.2-TI2V-5B",
}
"""Variant -> repository of its weights, for the page's `base_model`."""
README = "README.md"


def model_card(files: Sequence[Path], repo: str) -> str:
    """Return the page of a repository, from the headers of its files."""
    facts = [_facts(file) for file in files]
    variant = next((fact["variant"] for fact in facts if fact["variant"]), "")
    head = ["---", "library_name: diffusers", "tags:", "  - wan", "  - lora", "  - menma"]
    if variant in BASES:
        head.append(f"base_model: {BASES[variant]}")
    lines = [*head, "---", "", f"# {repo.rpartition('/')[2]}", ""]
    lines.append(f"Trained with Menma for {variant or 'Wan'}.\n")
    lines += ["| file | kind | rank | steps |", "|---|---|---|---|"]
    lines += [
        f"| `{file.name}` | {fact['kind']} | {fact['rank']} | {fact['steps']} |"
        for file, fact in zip(files, facts, strict=True)
    ]
    lines += ["", "In ComfyUI put the file into `models/loras`. In diffusers:", "", "```python"]
    lines += [f'pipe.load_lora_weights("{repo}", weight_name="{files[0].name}")', "```", ""]
    return "\n".join(lines)


def upload(files: Sequence[Path], card: str, repo: str, *, private: bool) -> str:
    """Upload files to the main branch of a repository; return its address.

    Raises:
        RunError: nobody can be reached, or it is not allowed; what was uploaded stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        for file in files:
            api.upload_file(path_or_fileobj=file, path_in_repo=file.name, repo_id=repo)
        if not api.file_exists(repo, README):
            api.upload_file(path_or_fileobj=card.encode(), path_in_repo=README, repo_id=repo)
    except (OSError, ValueError) as error:  # of which its own errors are
        raise RunError(
            f"{repo} cannot be written: {error}",
            hint="`hf auth login` with a token that may write, or HF_TOKEN",
        ) from error
    return str(address)


def _facts(file: Path) -> dict[str, Any]:
    told: Mapping[str, Any] = metadata_of(read_header(file))
    try:
        kind = json.loads(told.get("menma.run_config", "{}"))["adapter"]["kind"]
    except (ValueError, KeyError, TypeError):
        kind = told.get("menma.kind", "")
    return {
        "variant": told.get("menma.variant", ""),
        "kind": kind,
        "rank": told.get("ss_network_dim", ""),
        "steps": told.get("ss_steps", ""),
    }
