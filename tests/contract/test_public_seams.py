"""What docs/architecture.md promises to scripts: these names, with these parameters."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from trainer.adapters import load_adapter
from trainer.contract.config import load_config
from trainer.contract.errors import ConfigError
from trainer.models import load_image_encoder, load_text_encoder, load_transformer, load_vae


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_signatures() -> None:
    assert parameters(load_transformer)[:5] == ["path", "variant", "dtype", "device", "config"]
    assert parameters(load_vae)[0] == "path"
    assert parameters(load_text_encoder)[:2] == ["path", "tokenizer"]
    assert parameters(load_image_encoder)[0] == "path"
    assert parameters(load_adapter)[0] == "path"
    assert parameters(load_config) == ["path", "overrides"]


def test_load_config_takes_overrides_and_reports_all_problems(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('name = "x"\n')
    assert load_config(path, ["training.seed=5"]).training.seed == 5
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["training.sed=5", "adapter.rnak=2"])
    assert len(caught.value.problems) == 2
