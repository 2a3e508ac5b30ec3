"""Fitting the nano text encoder: a two-layer umT5 and its tokenizer, on generated captions.

Two tasks at once: naming masked tokens (as in BERT, arXiv 1810.04805), which keeps every word apart
from every other, and naming colour, shape, direction and ground from the mean of the tokens, which
brings the phrasings of one thing together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.clipart.scenes import COLOURS, DIRECTIONS, GROUNDS, SHAPES, UNCAPTIONED, Scene
from trainer.clipart.split import training_scene
from trainer.io.atomic_save import save_safetensors
from trainer.models.wan.fan_in import init_fan_in
from trainer.models.wan.text_encoder import TextEncoderConfig, build_umt5
from trainer.models.wan.tiny import tiny_tokenizer

TEXT_DIM = 64
_NUM_CAPTIONS = 4000
_BATCH_SIZE = 64
_LEARNING_RATE = 2e-3
_MASKED = 0.2
_UNKNOWN_ID = 3
"""Stands for a masked token; captions the tokenizer was made of have no unknown piece."""
_SPARE_WORDS = "abcdefghijklmnopqrstuvwxyz 0123456789 .,;:!?'-"


def _scenes(seed: int) -> list[Scene]:
    rng = np.random.default_rng((seed, 1))
    return [training_scene(rng) for _ in range(_NUM_CAPTIONS)]


def _labels(scene: Scene) -> list[int]:
    return [
        list(COLOURS).index(scene.colour),
        SHAPES.index(scene.shape),
        list(DIRECTIONS).index(scene.direction),
        list(GROUNDS).index(scene.ground),
    ]


class _Tasks(nn.Module):
    """The encoder and the four answers read from it."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.encoder = build_umt5(config)
        sizes = (len(COLOURS), len(SHAPES), len(DIRECTIONS), len(GROUNDS))
        self.heads = nn.ModuleList(nn.Linear(config.dim, size) for size in sizes)

    def forward(
        self, ids_BT: Tensor, masked_BT: Tensor, labels_B4: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of the masked tokens and of the four attributes."""
        given_BT = ids_BT != 0
        seen_BT = ids_BT.masked_fill(masked_BT, _UNKNOWN_ID)
        hidden_BTD = self.encoder(
            input_ids=seen_BT, attention_mask=given_BT.long()
        ).last_hidden_state
        logits = hidden_BTD[masked_BT] @ self.encoder.shared.weight.T
        words = functional.cross_entropy(logits / 8, ids_BT[masked_BT])
        weights_BT1 = given_BT.unsqueeze(-1).float()
        mean_BD = (hidden_BTD * weights_BT1).sum(1) / weights_BT1.sum(1)
        answers = [
            functional.cross_entropy(head(mean_BD), labels_B4[:, index])
            for index, head in enumerate(self.heads)
        ]
        return words, torch.stack(answers).mean()


def fit_text_encoder(path: Path, num_steps: int, seed: int) -> dict[str, float]:
    """Train tokenizer and encoder and write both as one file in ComfyUI's layout.

    Args:
        path: the .safetensors file; weights in bfloat16, the tokenizer inside.
        num_steps: optimizer steps of 64 captions.
        seed: of captions, weights and masks.

    Returns:
        The losses at the end, averaged over the last fifty steps.
    """
    import sentencepiece

    scenes = _scenes(seed)
    sentences = [scene.caption for scene in scenes]
    tokenizer = tiny_tokenizer([*sentences, UNCAPTIONED, _SPARE_WORDS], "identity")
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    config = TextEncoderConfig(
        vocab_size=-(-processor.get_piece_size() // 64) * 64,
        dim=TEXT_DIM,
        num_layers=2,
        num_heads=4,
        head_dim=16,
        ffn_dim=128,
        num_buckets=16,
    )
    ids = [[*processor.encode(sentence), 1] for sentence in sentences]
    labels = torch.tensor([_labels(scene) for scene in scenes])
    torch.manual_seed(seed)
    tasks = _Tasks(config)
    init_fan_in(tasks.encoder, seed)
    losses = _fit(tasks, ids, labels, num_steps, seed)
    spiece = torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)
    tensors: dict[str, Any] = {
        name: value.detach().bfloat16() for name, value in tasks.encoder.named_parameters()
    }
    save_safetensors(tensors | {"spiece_model": spiece}, path)
    return losses


def _fit(
    tasks: _Tasks, ids: Sequence[Sequence[int]], labels: Tensor, num_steps: int, seed: int
) -> dict[str, float]:
    optimizer = torch.optim.AdamW(tasks.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    course = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=_LEARNING_RATE, total_steps=num_steps
    )
    random = torch.Generator().manual_seed(seed)
    ends: list[tuple[float, float]] = []
    for _ in range(num_steps):
        chosen = torch.randint(len(ids), (_BATCH_SIZE,), generator=random).tolist()
        ids_BT = nn.utils.rnn.pad_sequence([torch.tensor(ids[i]) for i in chosen], batch_first=True)
        drawn = torch.rand(ids_BT.shape, generator=random)
        words, answers = tasks(ids_BT, (drawn < _MASKED) & (ids_BT > 1), labels[chosen])
        optimizer.zero_grad()
        (words + answers).backward()
        nn.utils.clip_grad_norm_(tasks.parameters(), 1.0)
        optimizer.step()
        course.step()
        ends.append((float(words.detach()), float(answers.detach())))
    words_loss, answers_loss = np.mean(ends[-50:], axis=0)
    return {
        "masked_token_loss": round(float(words_loss), 4),
        "attribute_loss": round(float(answers_loss), 4),
    }
