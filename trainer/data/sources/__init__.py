"""Where items come from: one module a kind of source."""

from __future__ import annotations

from trainer.contract.dataset_config import SourceOptions
from trainer.data.sources.folder import scan_folder
from trainer.data.sources.item import MediaItem, SourceScan
from trainer.data.sources.jsonl import scan_jsonl

__all__ = ["MediaItem", "SourceScan", "scan_source"]


def scan_source(source: SourceOptions) -> SourceScan:
    """List the items of a source with their captions, and what cannot be used. Opens no media."""
    return scan_jsonl(source) if source.jsonl_file is not None else scan_folder(source)
