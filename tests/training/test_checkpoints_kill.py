"""SIGKILL at random moments of training and saving: what is left is always a whole checkpoint."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.engine.toy import AdamWFactory, LoraStep, batches_of_step
from tests.warm import start as warm
from trainer.engine.local import LocalEngine
from trainer.training.checkpoints import CheckpointStore

ROOT = Path(__file__).parents[2]
ROUNDS = int(os.environ.get("MENMA_KILL_ROUNDS", "8"))
STEPS = 100_000


def make_engine() -> LocalEngine:
    module = LoraStep(blocks=1)
    return LocalEngine(
        module,
        module.trainable(),
        AdamWFactory(),
        device="cpu",
        max_grad_norm=0,
        gradient_accumulation_steps=1,
    )


def train_step(engine: LocalEngine, step: int) -> None:
    engine.forward_backward(batches_of_step(step % 50, 0, 1, 1))
    engine.update(1e-3)


def digest(engine: LocalEngine) -> str:
    state = hashlib.blake2b()
    for value in engine.full_parameters().values():
        state.update(value.numpy().tobytes())
    return state.hexdigest()


def train_for_ever(root: Path) -> None:
    """Resume, train, save after every step, say so; until killed."""
    engine, store = make_engine(), CheckpointStore(root, keep_last=2)
    store.tidy()
    checkpoint = store.resolve("auto")
    first = 0
    if checkpoint is not None:
        engine.load_state(checkpoint.path)
        first = checkpoint.progress["step"]
    for step in range(first + 1, STEPS):
        train_step(engine, step)
        store.save(step, lambda _: None, {"step": step, "digest": digest(engine)}, engine)
        sys.stdout.write(f"{step}\n")
        sys.stdout.flush()


@pytest.mark.slow
def test_kill_loop(tmp_path):
    chance = random.Random(5)
    announced = 0
    for _ in range(ROUNDS):
        process = warm.Popen(
            [sys.executable, "-m", "tests.training.test_checkpoints_kill", str(tmp_path / "run")],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        line = process.stdout.readline()  # it has resumed and saved once
        assert line, "the trainer could not resume"
        time.sleep(chance.uniform(0, 0.12))
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()
        process.wait(120)
        announced = max(announced, *(int(word) for word in (line + rest).split() if word))

        warned: list[str] = []
        found = CheckpointStore(tmp_path / "run", 2, warned.append).latest()
        assert found is not None
        assert not warned  # nothing half-made was ever in sight
        assert found.step in {announced, announced + 1}
        engine = make_engine()
        engine.load_state(found.path)
        assert digest(engine) == found.progress["digest"]

    reference = make_engine()  # never killed
    for step in range(1, found.step + 1):
        train_step(reference, step)
    assert digest(reference) == found.progress["digest"]


if __name__ == "__main__":
    train_for_ever(Path(sys.argv[1]))
