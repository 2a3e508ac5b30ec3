"""LoRA files: one reader for every known layout, one writer for each layout we offer."""
