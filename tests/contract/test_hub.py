"""Files of the hub: how they are written, found in the cache, and downloaded from a stand-in."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.contract.config_io import dump_config, load_config
from trainer.contract.config_rules import check_files
from trainer.contract.errors import ConfigError
from trainer.contract.hub import HubFile, parse_reference, references

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "split_files/vae/wan_2.1_vae.safetensors": b"the vae",
    "text_encoder/config.json": b"{}",
    "text_encoder/model.safetensors": b"the encoder",
    "README.md": b"words",
}


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does, for one repository; `closed` shuts it, `gated` asks to agree."""

    closed = False
    asked: list[str] = []  # noqa: RUF012  (shared on purpose)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        Hub.asked.append(self.path)
        path = self.path.partition("?")[0]
        if Hub.closed or "ada/wan" not in path:
            self.tell(401 if "secret" in path else 404, b"", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in FILES]
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
                for name, data in FILES.items()
            ]
            what: Any = {"id": "ada/wan", "sha": COMMIT, "siblings": siblings}
            self.tell(200, json.dumps(tree if "/tree/" in path else what).encode(), {})
        else:
            name = path.partition("/resolve/")[2].partition("/")[2]
            data = FILES.get(name)
            if data is None:
                self.tell(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            else:
                tag = {"ETag": f'"{digest(data)}"', "X-Repo-Commit": COMMIT}
                self.tell(200, data if body else b"", tag, length=len(data))

    def tell(self, code: int, data: bytes, headers: dict[str, str], length: int = -1) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length if length >= 0 else len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


def digest(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """Return the environment for processes that use a hub of this machine, with an empty cache."""
    Hub.closed, Hub.asked = False, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_hush",
        "PYTHONPATH": str(ROOT),
    }
    yield SimpleNamespace(environment=environment)
    server.shutdown()
    server.server_close()


CONFIG = """\
[model]
variant = "wan2.1-t2v-1.3b"
vae = "hf:ada/wan/split_files/vae/wan_2.1_vae.safetensors"
text_encoder = "hf:ada/wan/text_encoder"
"""


def fetch(folder: Path, environment: dict[str, str], text: str = CONFIG) -> tuple[int, Any, str]:
    (folder / "fish.toml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "app", "fetch", "fish.toml", "--json"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout or "null"), done.stderr


def test_files_and_folders_are_downloaded_once_and_then_found_offline(hub, tmp_path):
    code, found, words = fetch(tmp_path, hub.environment)
    assert code == 0, words
    vae, encoder = Path(found["vae"]["path"]), Path(found["text_encoder"]["path"])
    assert vae.read_bytes() == b"the vae"
    assert {path.name for path in encoder.iterdir()} == {"config.json", "model.safetensors"}
    assert not (encoder.parent / "README.md").exists()
    assert COMMIT in vae.parts
    everything = [path for path in (tmp_path / "hf").rglob("*") if path.is_file()]
    assert not any(b"hf_hush" in path.read_bytes() for path in everything)

    Hub.closed, asked = True, len(Hub.asked)
    offline = hub.environment | {"HF_HUB_OFFLINE": "1"}
    code, found, words = fetch(tmp_path, offline)
    assert (code, found) == (0, {})
    assert len(Hub.asked) == asked
    shown = subprocess.run(
        [sys.executable, "-c", "from trainer.contract.config_io import load_config as l;"
         "print(l('fish.toml').model.vae)"],
        cwd=tmp_path, env=offline, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.strip() == str(vae)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("hf:ada/wan/nothing.safetensors", "the repository has no such file"),
        ("hf:ada/other/x.safetensors", "there is no such repository"),
        ("hf:ada/wan/no_folder", "the repository has no such folder"),
    ],
)
def test_what_is_not_there_is_told(hub, tmp_path, reference, words):
    text = f'[model]\nvariant = "wan2.1-t2v-1.3b"\nvae = "{reference}"\n'
    code, _, told = fetch(tmp_path, hub.environment, text)
    assert code == 2
    assert words in told
    assert "hf_hush" not in told
    assert "Traceback" not in told


def test_without_a_network_it_is_told(hub, tmp_path):
    nobody = hub.environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    code, _, told = fetch(tmp_path, nobody)
    assert code == 2
    assert "cannot be downloaded, and the cache does not have it" in told


@pytest.mark.parametrize("text", ["hf:a/b/c.safetensors", "hf:a/b@v1.0/d/c.pth", "hf:a/b/d/"])
def test_references_are_read(text):
    found = parse_reference(text)
    assert found.repo == "a/b"
    assert parse_reference(str(found)) == found
    assert found.is_folder == (text == "hf:a/b/d/")
    assert found.revision == ("v1.0" if "@" in text else "main")


@pytest.mark.parametrize("text", ["hf:", "hf:a/b", "hf:a", "hf:a/b/../../x", "hf:../b/c"])
def test_what_is_no_reference_is_refused_with_its_key(tmp_path, text):
    with pytest.raises(ValueError, match="hf:owner/repo/file"):
        parse_reference(text)
    path = tmp_path / "x.toml"
    path.write_text(f'[model]\nvae = "{text}"\n')
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    (problem,) = caught.value.problems
    assert (problem.key, problem.line) == ("model.vae", 2)


def test_a_config_keeps_its_reference_until_the_file_is_there(tmp_path, monkeypatch):
    path = tmp_path / "x.toml"
    path.write_text('[model]\ntransformer = "hf:a/b/c.safetensors"\n')
    config = load_config(path)
    assert references(config) == {"transformer": HubFile("a/b", "c.safetensors")}
    assert 'transformer = "hf:a/b/c.safetensors"' in dump_config(config, base=tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    told = {problem.key: problem.message for problem in check_files(config, "train")}
    assert "HF_HUB_OFFLINE" in told["model.transformer"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert "model.transformer" not in {p.key for p in check_files(config, "train")}
