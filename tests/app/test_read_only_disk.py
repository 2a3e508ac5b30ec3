"""Folders that refuse to be written: words and an exit code, never a traceback."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from app_runs import Runs
from screens import screen_text

from app.cli.main import run as run_menma
from app.tui.app import MenmaApp
from app.tui.sources import Sources
from trainer.contract import run_dir

REFUSES = Path("/sys/menma-test")
"""Nobody can make a folder there, root neither."""
pytestmark = pytest.mark.skipif(not Path("/sys").is_dir(), reason="a folder of Linux")


def test_a_queue_that_cannot_be_made(menma, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(REFUSES))
    for arguments in (("list",), ("add", "cache", "a.toml"), ("rebuild",)):
        code, _, err = menma("queue", *arguments)
        assert code == 1
        assert str(REFUSES) in err
        assert "Traceback" not in err


def test_a_run_that_cannot_be_made(menma, config):
    code, _, err = menma("train", config, "--set", f'output.runs_dir="{REFUSES}"')
    assert code == 1
    assert f"cannot write {REFUSES}/fish" in err


def test_keys_and_theme_that_cannot_be_kept(menma, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(REFUSES))
    code, _, err = menma("keys", "--write")
    assert (code, f"cannot write {REFUSES}" in err) == (1, True)
    assert menma("keys").code == 0


def test_a_request_to_a_run_on_a_disk_that_has_become_read_only(
    tmp_path, monkeypatch, capsys, runs: Runs
):
    run = runs.start("steps")

    def refuse(path: Path, content: object) -> None:
        from trainer.contract.files import disk_errors

        with disk_errors(path):
            raise OSError(30, "Read-only file system")

    monkeypatch.setattr(run_dir, "write_json", refuse)
    code = run_menma(["runs", "save", str(run.root), "--no-wait"])
    assert (code, "the file system is read-only" in capsys.readouterr().err) == (1, True)


def test_the_app_opens_without_its_queue(tmp_path):
    async def work() -> None:
        app = MenmaApp(Sources(tmp_path / "runs", REFUSES / "queue"))
        async with app.run_test(size=(100, 24)) as pilot:
            for _ in range(1200):
                if "cannot be used" in screen_text(app):
                    break
                await pilot.pause(0.05)
            else:
                raise AssertionError(screen_text(app))
            await pilot.press("P")
            assert app.is_running

    asyncio.run(work())
