"""SIGKILL at random moments of a cache job: what is there is whole, and the next run finishes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest
from data_clips import write_caption, write_video
from data_fakes import Models, dataset_of
from safetensors import safe_open

from trainer.data.cache_index import read_index
from trainer.data.items import load_cached_dataset
from trainer.jobs.cache import CacheOptions

ROUNDS = 40
# One process that imports torch once, and forks a cache job for every line it is given.
FORKER = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    sys.path[:0] = [{root!r}, {tests!r}]
    import torch
    from data_fakes import Models, dataset_of
    from trainer.data import entries
    torch.set_num_threads(1)
    # Large entries, so that a kill often falls into the middle of a write.
    original = entries.save
    entries.save = lambda tensors, metadata: original(
        tensors | {{"ballast": torch.ones(3_000_000)}}, metadata)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            Models().cache(dataset_of(Path({folder!r}), frame_extraction="chunk"))
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    """
)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_jobs_leave_whole_entries_only(tmp_path):
    for name in "abcdef":
        write_video(tmp_path / f"{name}.mp4", 20, first_number=ord(name))
        write_caption(tmp_path / f"{name}.mp4", f"clip {name}")
    here = Path(__file__).parent
    code = FORKER.format(root=str(here.parent.parent), tests=str(here), folder=str(tmp_path))
    forker = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    cache = tmp_path / "menma_cache"
    generator = random.Random(0)
    killed = killed_while_writing = 0
    try:
        for _ in range(ROUNDS):
            forker.stdin.write("go\n")
            forker.stdin.flush()
            child = int(forker.stdout.readline())
            time.sleep(generator.uniform(0.0, 0.25))
            with suppress(ProcessLookupError):  # it was done already
                os.kill(child, signal.SIGKILL)
            killed += int(forker.stdout.readline()) == -signal.SIGKILL
            killed_while_writing += bool(list(cache.glob(".*.partial")))
            for path in cache.glob("*.safetensors"):
                with safe_open(path, "pt") as entry:
                    assert entry.metadata()["menma_cache"]
                    assert entry.get_tensor("ballast").min() == 1
            if (cache / "cache_index.json").exists():
                assert read_index(cache)
            if generator.random() < 0.5:  # so that there is always something to write
                for path in list(cache.glob("*.latents.safetensors"))[::2]:
                    path.unlink()
    finally:
        forker.stdin.close()
        forker.wait()
        forker.stdout.close()
    assert killed > ROUNDS / 2
    assert killed_while_writing > 0
    models = Models()
    dataset = dataset_of(tmp_path, frame_extraction="chunk")
    report = models.cache(dataset, options=CacheOptions(dtype="fp32"))
    assert report.encoded + report.reused == 24
    assert not list(cache.glob(".*.partial"))
    assert len(load_cached_dataset(dataset, models.settings()).items) == 24
