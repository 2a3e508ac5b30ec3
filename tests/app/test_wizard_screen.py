"""The wizard, walked through by keys."""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from screens import screen_text
from textual.pilot import Pilot
from textual.widgets import Input
from weight_headers import write_parts, write_transformer

from app.domain import cards
from app.domain.cards import Card
from app.queue.adding import job_spec
from app.queue.store import QueueStore
from app.tui.app import MenmaApp
from app.tui.screens.config import card_choice
from app.tui.screens.wizard import model_step
from app.tui.screens.wizard import screen as wizard
from app.tui.screens.wizard.screen import WizardScreen
from app.tui.sources import Sources
from trainer.contract.memory_model import gpu_of_memory

SMALL, LARGE = (80, 24), (120, 40)
Steps = Callable[[Pilot, MenmaApp], Awaitable[None]]


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    """Return a folder with clips and pictures; no GPU, no worker, no weights but those in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cards, "choose_card", lambda name, size: None)
    monkeypatch.setattr(card_choice, "choose_card", lambda name, size: None)
    monkeypatch.setattr(wizard, "ensure_worker", lambda folder: None)
    monkeypatch.setattr(model_step, "usual_places", lambda runs: [tmp_path / "models"])
    for folder, ending in (("clips", "mp4"), ("pictures", "png")):
        (tmp_path / folder).mkdir()
        for name in "abc":
            (tmp_path / folder / f"{name}.{ending}").write_bytes(b"")
            (tmp_path / folder / f"{name}.txt").write_text(f"{name} fish")
    return tmp_path


@pytest.fixture
def models(place: Path) -> Path:
    """Return a folder with the weights of two models."""
    folder = place / "models"
    write_transformer(folder / "wan2.1_t2v_1.3B_bf16.safetensors", "wan2.1-t2v-1.3b")
    write_transformer(folder / "wan2.1_t2v_14B_bf16.safetensors", "wan2.1-t2v-14b")
    write_parts(folder)
    return folder


def drive(steps: Steps, size: tuple[int, int] = SMALL) -> MenmaApp:
    """Open the wizard from the list of jobs, and do something in it."""

    async def work() -> MenmaApp:
        app = MenmaApp(Sources(Path("runs"), Path("queue").absolute()))
        async with app.run_test(size=size, notifications=True) as pilot:
            await seen(pilot, app, "n makes a training")
            await pilot.press("n")
            await seen(pilot, app, "weight files found")
            await steps(pilot, app)
        return app

    return asyncio.run(work())


async def seen(pilot: Pilot, app: MenmaApp, words: str) -> str:
    """Wait until words are on the screen; return the screen."""
    for _ in range(1200):
        text = screen_text(app)
        if words in text:
            return text
        await pilot.pause(0.05)
    raise AssertionError(f"{words!r} does not come:\n{text}")


def put(app: MenmaApp, name: str, words: str) -> None:
    """Put words into a field; keys alone would take long."""
    app.screen.query_one(f"#wizard-{name}", Input).value = words


async def choose_demo(pilot: Pilot, app: MenmaApp) -> None:
    await pilot.press("G", "enter")
    await seen(pilot, app, "2/5")


def jobs(place: Path) -> list[tuple[str, ...]]:
    return [job.spec.argv for job in QueueStore(place / "queue").jobs()]


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_the_demo_model_from_nothing_to_the_queue(place, size):
    async def steps(pilot, app):
        text = screen_text(app)
        assert "1/7" in text
        assert "the demo model" in text
        commands = [command.title for command in app.get_system_commands(app.screen)]
        assert commands[0] == "New training"
        await choose_demo(pilot, app)
        await pilot.press("j", "j")
        await seen(pilot, app, "How something moves")
        await pilot.press("enter")
        await seen(pilot, app, "3 clips, all captioned")
        await pilot.press("enter")
        text = await seen(pilot, app, "config: configs/motion.toml")
        assert "4/5" in text
        assert "a fish" in text
        await pilot.press("tab", "ctrl+u", *"20")
        await seen(pilot, app, "20 steps show each of your 3 about 20 times")
        await pilot.press("enter", "enter")
        text = await seen(pilot, app, "menma queue chain configs/motion.toml")
        await seen(pilot, app, "trains on a CPU")
        assert all(len(line) <= size[0] for line in text.splitlines())
        await pilot.press("t")
        await seen(pilot, app, "# Menma config from preset 'demo'")
        await pilot.press("t", "c")
        assert "--demo --goal motion --data clips" in await seen(pilot, app, "menma new")
        await pilot.press("escape", "enter")
        await seen(pilot, app, "JOBS")
        await seen(pilot, app, "sample  motion")

    drive(steps, size)
    assert jobs(place) == [
        ("cache", "configs/motion.toml"),
        ("train", "configs/motion.toml"),
        ("sample", "runs/motion"),
    ]
    content = tomllib.loads(Path("configs/motion.toml").read_text())
    assert content["training"]["max_steps"] == 20
    assert content["sampling"]["prompts"] == [{"prompt": "a fish"}]


def test_a_model_from_the_disk_with_a_preset_for_a_gpu(models, place):
    async def steps(pilot, app):
        text = screen_text(app)
        assert "4 weight files found in ./models" in text
        assert "models/wan_2.1_vae.safetensors" in text
        await pilot.press("j")
        await seen(pilot, app, "models/wan2.1_t2v_14B_bf16")
        await pilot.press("enter")
        await seen(pilot, app, "2/7")
        await pilot.press("G", "k", "k", "enter")  # a motion
        await seen(pilot, app, "3 clips")
        await pilot.press("enter")
        await seen(pilot, app, "no NVIDIA GPU was found")
        await pilot.press("j", "j", "j", "enter")
        text = await seen(pilot, app, "Changes against Menma's defaults:")
        assert "24  fits   motion, clips" in text
        assert "/ 22.1 GiB" in text
        await pilot.press("j")
        text = await seen(pilot, app, "Changes against wan2.1-t2v-14b-motion-24gb:")
        await pilot.press("slash", *"defaults", "enter")
        await seen(pilot, app, "No preset: Menma's defaults count.")
        await pilot.press("escape")
        await seen(pilot, app, "motion-24gb")
        await pilot.press("g", "enter")
        await seen(pilot, app, "600 steps show each of your 3")
        await pilot.press("enter", "enter", "enter")
        await seen(pilot, app, "/ 22.1 GiB")
        await pilot.press("G", "enter")
        await seen(pilot, app, "CONFIG")
        await seen(pilot, app, "configs/motion.toml")

    drive(steps)
    content = tomllib.loads(Path("configs/motion.toml").read_text())
    assert content["model"]["transformer"] == "models/wan2.1_t2v_14B_bf16.safetensors"
    assert content["memory"]["weight_format"] == "fp8_scaled"
    assert content["training"]["max_steps"] == 600
    assert jobs(place) == []


def test_back_keeps_every_answer_and_asks_nothing_twice(models):
    async def steps(pilot, app):
        await pilot.press("j", "enter")
        await seen(pilot, app, "2/7")
        await pilot.press("j", "enter")  # a style
        await seen(pilot, app, "3 clips")
        await pilot.press("ctrl+u", *"pictures", "enter")
        await seen(pilot, app, "4/7")
        await pilot.press("j", "j", "j", "j", "enter")
        await seen(pilot, app, "Changes against")
        await pilot.press("j")
        await seen(pilot, app, "Changes against wan2.1-t2v-14b-style-32gb")
        await pilot.press("enter")
        await seen(pilot, app, "6/7")
        put(app, "run-name", "ink")
        put(app, "prompt", "an ink fish")
        await pilot.press("enter", "enter", "enter")
        await seen(pilot, app, "7/7")
        chosen = app.screen.draft.preset
        for number in range(6, 0, -1):
            await pilot.press("escape")
            await seen(pilot, app, f" {number}/7")
        for number in range(2, 6):
            await pilot.press("enter")
            await seen(pilot, app, f" {number}/7")
        await seen(pilot, app, "Changes against wan2.1-t2v-14b-style-32gb")
        await pilot.press("enter")
        await seen(pilot, app, "an ink fish")
        await pilot.press("enter", "enter", "enter")
        await seen(pilot, app, "configs/ink.toml")
        draft = app.screen.draft
        assert draft.preset == chosen
        assert draft.data.path == Path("pictures")
        assert draft.card.gpu.name == "32 GB GPU"

    drive(steps, LARGE)


def test_what_is_offered_follows_other_answers_until_it_is_changed(place):
    (place / "dancing").mkdir()
    (place / "dancing" / "a.mp4").write_bytes(b"")
    (place / "dancing" / "a.txt").write_text("somebody dances")

    async def steps(pilot, app):
        await choose_demo(pilot, app)
        await pilot.press("enter")
        await seen(pilot, app, "3 clips")
        await pilot.press("enter")
        await seen(pilot, app, "configs/character.toml")
        await pilot.press("escape", "ctrl+u", *"dancing", "enter")
        await seen(pilot, app, "configs/dancing.toml")
        await seen(pilot, app, "somebody dances")
        put(app, "run-name", "mine")
        await pilot.press("escape", "ctrl+u", *"clips", "enter")
        text = await seen(pilot, app, "configs/mine.toml")
        assert "a fish" in text

    drive(steps)


def test_mistakes_are_told_on_their_step(place, models):
    (place / "configs").mkdir()
    (place / "configs" / "fish.toml").write_text("")
    (place / "runs" / "old").mkdir(parents=True)

    async def steps(pilot, app):
        put(app, "vae", "")
        for file in models.iterdir():
            if "vae" in file.name:
                file.rename(file.with_suffix(".bak"))
        await pilot.press("tab", "tab")
        put(app, "transformer", "models/none.safetensors")
        await pilot.press("enter")
        await seen(pilot, app, "! transformer: no such file")
        put(app, "transformer", "models/umt5_xxl_fp16.safetensors")
        await pilot.press("enter")
        await seen(pilot, app, "is an umT5 text encoder")
        await pilot.press("g", "escape")
        await seen(pilot, app, "n makes a training")
        await pilot.press("n")
        await seen(pilot, app, "3 weight files found")
        await pilot.press("enter")
        await seen(pilot, app, "! VAE: none was found")
        assert app.focused.id == "wizard-vae"
        (models / "wan_2.1_vae.bak").rename(models / "v.safetensors")
        put(app, "vae", "models/v.safetensors")
        await pilot.press("enter")
        await seen(pilot, app, "2/7")
        await pilot.press("G", "k", "enter")  # images only
        await seen(pilot, app, "learned from images, and clips has none")
        await pilot.press("enter")
        await seen(pilot, app, "3/7")
        put(app, "folder", "nowhere")
        await seen(pilot, app, "no such folder")
        put(app, "folder", "")
        await pilot.press("enter")
        await seen(pilot, app, "! give a folder")
        put(app, "folder", "pictures")
        await seen(pilot, app, "3 images, all captioned")
        await pilot.press("enter")
        await seen(pilot, app, "4/7")
        put(app, "num-gpus", "0")
        await pilot.press("enter")
        await seen(pilot, app, "the number of GPUs is 1 to 64")
        put(app, "num-gpus", "1")
        await pilot.press("enter")
        await seen(pilot, app, "Changes against")
        await pilot.press("enter")
        await seen(pilot, app, "6/7")
        for name, words in (("fish", "configs/fish.toml already"), ("old", "a run runs/old"),
                            ("a b", "a name has letters")):  # fmt: skip
            put(app, "run-name", name)
            put(app, "steps", "5")
            app.screen.query_one("#wizard-prompt").focus()
            await pilot.press("enter")
            await seen(pilot, app, words)
            assert app.focused.id == "wizard-run-name"
        put(app, "run-name", "new")
        put(app, "steps", "0")
        app.screen.query_one("#wizard-prompt").focus()
        await pilot.press("enter")
        await seen(pilot, app, "a whole number from 1 on")

    drive(steps)


def test_a_file_that_comes_in_between_is_not_overwritten(place):
    async def steps(pilot, app):
        await choose_demo(pilot, app)
        await pilot.press("enter")
        await seen(pilot, app, "3 clips")
        await pilot.press("enter")
        await seen(pilot, app, "4/5")
        await pilot.press("enter", "enter", "enter")
        await seen(pilot, app, "5/5")
        (place / "configs").mkdir()
        (place / "configs" / "character.toml").write_text("theirs")
        await pilot.press("j", "enter")
        await seen(pilot, app, "! configs/character.toml exists already")
        await pilot.press("escape")
        await seen(pilot, app, "4/5")

    drive(steps)
    assert (place / "configs" / "character.toml").read_text() == "theirs"
    assert jobs(place) == []


def test_run_now_goes_before_what_waits_and_takes_the_gpus_of_the_preset(
    models, place, monkeypatch
):
    here = Card(gpu=gpu_of_memory(23.6, "RTX 4090"), count=2, here=True)
    monkeypatch.setattr(cards, "choose_card", lambda name, size: here)
    monkeypatch.setattr(cards, "ram_bytes", lambda: 64 * 2**30)
    store = QueueStore(place / "queue")
    store.paused = True
    store.add(job_spec(["cache", "other.toml"], priority=3))

    async def steps(pilot, app):
        await pilot.press("n")
        await seen(pilot, app, "weight files found")
        await pilot.press("j", "enter")
        await seen(pilot, app, "2/7")
        await pilot.press("enter")
        await seen(pilot, app, "3 clips")
        put(app, "folder", "pictures")
        await pilot.press("enter")
        await seen(pilot, app, "this machine: 2 x RTX 4090, 23.6 GiB")
        put(app, "num-gpus", "3")
        await pilot.press("enter")
        await seen(pilot, app, "! this machine has 2")
        put(app, "num-gpus", "2")
        await pilot.press("enter")
        await seen(pilot, app, "2x24  fits")
        await seen(pilot, app, "Changes against Menma's defaults")
        await pilot.press("enter")
        await seen(pilot, app, "6/7")
        put(app, "prompt", "")
        await pilot.press("enter", "enter", "enter")
        await seen(pilot, app, "run now: cache, train, before")
        await pilot.press("enter")
        await seen(pilot, app, "train   pictures")

    async def work():
        app = MenmaApp(Sources(Path("runs"), Path("queue").absolute()))
        async with app.run_test(size=LARGE, notifications=True) as pilot:
            await seen(pilot, app, "other")
            await steps(pilot, app)

    asyncio.run(work())
    specs = [job.spec for job in QueueStore(place / "queue").jobs()]
    new = [spec for spec in specs if spec.argv[-1].endswith("pictures.toml")]
    assert [(spec.argv[0], spec.priority, spec.gpus) for spec in new] == [
        ("cache", 4, 1), ("train", 4, 2),
    ]  # fmt: skip


def test_own_files_are_typed_completed_and_kept(place, models):
    (models / "wan_2.1_vae.safetensors").rename(models / "other.safetensors")

    async def steps(pilot, app):
        await pilot.press("G", "k", "enter")  # other files
        await pilot.press(*"models/wan2.1_t2v_14", "tab")
        field = app.screen.query_one("#wizard-transformer", Input)
        assert field.value == "models/wan2.1_t2v_14B_bf16.safetensors"
        await pilot.press("escape")  # leaves: nothing was answered
        await seen(pilot, app, "n makes a training")
        await pilot.press("n")
        await seen(pilot, app, "weight files found")
        await pilot.press("tab")
        await pilot.press("down")
        assert app.screen.query_one("#wizard-variant", Input).value == "wan2.1-t2v-14b"
        put(app, "variant", "")
        await pilot.press("tab")
        put(app, "transformer", "models/wan2.1_t2v_14B_bf16.safetensors")
        await pilot.press("enter")
        await seen(pilot, app, "2/7")
        assert app.screen.draft.model.variant == "wan2.1-t2v-14b"
        assert app.screen.draft.model.vae == Path("models/other.safetensors")
        await pilot.press("escape", "escape")
        await seen(pilot, app, "What was answered is lost")
        await pilot.press("escape")
        assert isinstance(app.screen, WizardScreen)
        await pilot.press("escape")
        await seen(pilot, app, "What was answered is lost")
        await pilot.press("y")
        await seen(pilot, app, "n makes a training")

    drive(steps)
