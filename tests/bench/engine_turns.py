"""A process that measures one engine against the plain loop: `engine_turns.py ENGINE`."""

from __future__ import annotations

import sys

from trainer.bench.engine import measure

if __name__ == "__main__":
    print(measure(pairs=2, engine=sys.argv[1]))
