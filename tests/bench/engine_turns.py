"""A process that measures one engine against the plain loop: `engine_turns.py ENGINE`."""

from __future__ import annotations

import sys

from trainer.bench import engine
from trainer.contract.variants import TransformerConfig

SMALL_MODEL = TransformerConfig(dim=64, ffn_dim=128, num_heads=2, num_layers=2)
SMALL_GRID = (3, 16, 16)

if __name__ == "__main__":
    engine.CONFIG, engine.GRID = SMALL_MODEL, SMALL_GRID
    print(engine.measure(pairs=2, engine=sys.argv[1]))
