"""`python -m trainer.nano`: make the nano models from nothing, or go on making them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from trainer.jobs.base import emit_to_stdout, run_guarded
from trainer.nano.recipe import Plan, Recipe


def main(arguments: list[str]) -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.nano", description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path("nano"), help="folder for everything on the way"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    recipe = Recipe(options.work, Plan(), emit_to_stdout, options.threads)
    return run_guarded(recipe.run, emit_to_stdout)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
