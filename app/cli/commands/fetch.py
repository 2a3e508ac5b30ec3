"""`menma fetch`: download the files that a config names on the Hugging Face hub."""

from __future__ import annotations

from typing import Any

from app.cli import output
from app.cli.options import Config, Json, Overrides, command_app

app = command_app()


@app.command()
def fetch(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Download the files of `[model]` that are written as hf:owner/repo/file.

    What the cache has is not downloaded again; training does the same when it starts. Private and
    gated models need `hf auth login` or HF_TOKEN.
    """
    from trainer.contract import hub
    from trainer.contract.config_io import load_config

    files = hub.references(load_config(config, overrides or ()))
    found: dict[str, Any] = {}
    for field, file in files.items():
        output.say(f"model.{field}: downloading {file}")
        found[field] = {"reference": str(file), "path": str(hub.download(file))}
    if as_json:
        output.json_data(found)
        return
    for field, told in found.items():
        output.data(f"{field}  {told['path']}")
    if not found:
        output.say("Nothing to download: all files are on this machine.")
