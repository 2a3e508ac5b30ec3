"""`menma push`: what goes to the hub, and what does not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from trainer.contract.events import EventWriter
from trainer.contract.run_dir import RunDir


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return a stand-in for the hub's client, which notes what it is given."""
    found = SimpleNamespace(made=[], files={}, has_page=False, fails=False)

    def upload(path_or_fileobj: Any, path_in_repo: str, repo_id: str) -> None:
        if found.fails:
            raise huggingface_hub.errors.LocalEntryNotFoundError("no network")
        content = path_or_fileobj
        found.files[path_in_repo] = content if isinstance(content, bytes) else content.read_bytes()

    def make(repo: str, private: bool, exist_ok: bool) -> str:
        found.made.append((repo, private))
        return f"https://hub/{repo}"

    api = SimpleNamespace(
        create_repo=make, upload_file=upload, file_exists=lambda repo, name: found.has_page
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    return found


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "fish")
    run.output.mkdir(parents=True)
    metadata = {
        "menma.variant": "wan2.1-t2v-1.3b", "ss_network_dim": "16", "ss_steps": "600",
        "menma.run_config": '{"adapter": {"kind": "lora"}}',
    }  # fmt: skip
    file = run.output / "fish.safetensors"
    save_file({"a": torch.zeros(1)}, file, metadata)
    emit = EventWriter(run.events)
    emit("output", step=600, path=str(file))
    emit("end", reason="done", step=600)
    run.config.write_text('[logging]\nwebhook = "https://example.org/secret"\n')
    return run


def test_outputs_and_a_page_are_uploaded_and_nothing_else(menma, hub, run):
    answer = menma("push", "fish", "ada/fish")
    assert (answer.code, answer.out) == (0, "https://hub/ada/fish\n")
    assert hub.made == [("ada/fish", True)]
    assert set(hub.files) == {"fish.safetensors", "README.md"}
    assert hub.files["fish.safetensors"] == (run.output / "fish.safetensors").read_bytes()
    page = hub.files["README.md"].decode()
    assert "base_model: Wan-AI/Wan2.1-T2V-1.3B" in page
    assert "| `fish.safetensors` | lora | 16 | 600 |" in page
    assert "secret" not in page


def test_a_page_that_is_there_stays_and_public_is_asked_for(menma, hub, run):
    hub.has_page = True
    file = run.output / "fish.safetensors"
    assert menma("push", str(file), "ada/fish", "--public").code == 0
    assert hub.made == [("ada/fish", False)]
    assert set(hub.files) == {"fish.safetensors"}


def test_a_dry_run_uploads_nothing(menma, hub, run):
    answer = menma("push", "fish", "ada/fish", "--dry-run")
    assert answer.code == 0
    assert "fish.safetensors -> ada/fish/fish.safetensors" in answer.out
    assert not hub.made


def test_what_goes_wrong_is_told(menma, hub, run):
    hub.fails = True
    answer = menma("push", "fish", "ada/fish")
    assert (answer.code, "no network" in answer.err) == (1, True)
    assert menma("push", "nobody", "ada/fish").code == 2
    assert menma("push", "nothing.safetensors", "ada/fish").code == 2
    (run.output / "fish.safetensors").unlink()
    assert "no output yet" in menma("push", "fish", "ada/fish").err
