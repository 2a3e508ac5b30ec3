"""Adapters: what is trained on top of a frozen transformer, and the files that hold it."""

from trainer.adapters.formats.reader import load_adapter

__all__ = ["load_adapter"]
