"""Which of DeepSpeed's modules are compiled on this machine; each takes minutes."""

from __future__ import annotations

from pathlib import Path


def is_built(name: str) -> bool:
    """Tell whether a module is compiled from this environment's DeepSpeed: else it is again."""
    import deepspeed
    from torch.utils import cpp_extension

    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    recipe = folder / "build.ninja"
    sources = Path(deepspeed.__file__).parent
    return (
        (folder / f"{name}.so").is_file()
        and recipe.is_file()
        and str(sources) in recipe.read_text(encoding="utf-8")
    )
