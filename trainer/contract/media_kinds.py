"""Which files are media, by the ends of their names."""

from __future__ import annotations

IMAGE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif"})
VIDEO_EXTENSIONS = frozenset(
    {".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg"}
)
OTHER_MEDIA_EXTENSIONS = frozenset(
    {".gif", ".tif", ".tiff", ".heic", ".jxl", ".ts", ".mts", ".m2ts", ".ogv", ".3gp", ".y4m"}
)
"""Media that Menma does not read; they are reported instead of being passed over."""
