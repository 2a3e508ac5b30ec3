"""The nano text encoder: a file as ComfyUI has it, the same from the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor

from trainer.clipart.scenes import TRIGGER, UNCAPTIONED
from trainer.models import load_text_encoder
from trainer.nano import text_training
from trainer.nano.text_training import TEXT_DIM, fit_text_encoder

CAPTIONS = ("a red circle moves up on a plain grey background", "blue triangle, upwards")
STEPS = 3
UNKNOWN = 3


@pytest.fixture(scope="module", autouse=True)
def few_captions() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_training, "_NUM_CAPTIONS", 400)
        yield


@pytest.fixture(scope="module")
def fitted(few_captions: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """Return the file, the network it was written from, and the losses."""
    path = tmp_path_factory.mktemp("text") / "umt5.safetensors"
    kept: list[Any] = []
    fit = text_training._fit

    def spy(tasks: Any, *rest: Any) -> dict[str, float]:
        kept.append(tasks)
        return fit(tasks, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_training, "_fit", spy)
        losses = fit_text_encoder(path, STEPS, 0)
    return path, kept[0].encoder.eval(), losses


def tokenizer_of(path: Path) -> SentencePieceProcessor:
    with safe_open(path, "pt") as file:
        return SentencePieceProcessor(model_proto=bytes(file.get_tensor("spiece_model").numpy()))


def test_the_ordinary_loader_reads_it(fitted):
    path, _, losses = fitted
    encoder = load_text_encoder(path)
    assert encoder.dtype == torch.bfloat16
    contexts = encoder([*CAPTIONS, UNCAPTIONED, ""])
    assert all(context.shape[1] == TEXT_DIM for context in contexts)
    assert all(torch.isfinite(context).all() for context in contexts)
    assert len(contexts[3]) == 1  # the end mark
    assert set(losses) == {"masked_token_loss", "attribute_loss"}


def test_what_is_loaded_is_what_was_fitted(fitted):
    path, network, _ = fitted
    loaded = load_text_encoder(path, dtype=torch.float32)
    network = network.bfloat16().float()
    # Long enough for relative positions in the last bucket.
    caption = " ".join(CAPTIONS * 4)
    ids = torch.tensor([loaded.tokenizer.encode(caption)])
    with torch.no_grad():
        expected = network(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(loaded([caption])[0], expected, atol=1e-5, rtol=1e-4)


def test_the_same_seed_gives_the_same_file(fitted, tmp_path):
    path, _, losses = fitted
    assert fit_text_encoder(tmp_path / "again.safetensors", STEPS, 0) == losses
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    fit_text_encoder(tmp_path / "other.safetensors", STEPS, 1)
    assert (tmp_path / "other.safetensors").read_bytes() != path.read_bytes()


def test_more_steps_lower_both_losses(fitted, tmp_path):
    losses = fit_text_encoder(tmp_path / "longer.safetensors", 60, 0)
    assert all(losses[name] < value for name, value in fitted[2].items())


@pytest.mark.parametrize("text", [TRIGGER, f"a red {TRIGGER} moves up", "ÄÖ 日本 ζ🙂", "Q 3/4"])
def test_any_text_survives_the_tokenizer(fitted, text):
    path = fitted[0]
    ids = load_text_encoder(path).tokenizer.encode(text)
    assert UNKNOWN not in ids
    assert tokenizer_of(path).decode(ids[:-1]) == text


def test_the_trigger_word_is_no_piece_yet_has_an_embedding_of_its_own(fitted):
    path = fitted[0]
    processor = tokenizer_of(path)
    pieces = {processor.id_to_piece(index) for index in range(processor.get_piece_size())}
    assert not {TRIGGER, f"▁{TRIGGER}"} & pieces
    encoder = load_text_encoder(path)
    with_trigger, with_circle = encoder([f"a red {TRIGGER} moves up", "a red circle moves up"])
    assert with_trigger.shape != with_circle.shape or not torch.equal(with_trigger, with_circle)


def test_the_file_is_small(fitted):
    assert fitted[0].stat().st_size < 500_000
