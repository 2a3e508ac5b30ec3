"""One tool from the command line to the file, with nothing standing in."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from .lora_tool_runs import effect, lora


@pytest.mark.usefixtures("warm_processes")
@pytest.mark.slow
def test_menma_lora_merge(tmp_path):
    one, two, output = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "out"))
    lora(one)
    lora(two, seed=3, layout="comfy")
    words = ["lora", "merge", f"{one}:0.5", str(two), "-o", str(output), "--json"]
    answer = subprocess.run(
        [sys.executable, "-m", "app", *words], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    said = json.loads(answer.stdout)
    assert (said["path"], said["ranks"]) == (str(output), {"8": 30})
    torch.testing.assert_close(
        effect((output, 1.0)), effect((one, 0.5), (two, 1.0)), rtol=1e-5, atol=1e-5
    )
