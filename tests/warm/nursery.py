"""The process that has imported everything and forks the processes which tests ask for.

    python -m tests.warm.nursery DESCRIPTOR

On the socket of that number it gets the JSON of a `Start` with the three streams, and answers with
the pid. It forks twice, so that the new process becomes a child of the test's process, which has
declared itself the one who takes orphans.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import socket
import sys

from tests.warm.birth import Start, become

MODULES = (
    "deepspeed",
    "torch._dynamo",
    "transformers",
    "trainer.sampling.pipeline",
    "app.cli.main",
)
MAX_BYTES = 1 << 20


def load() -> None:
    """Import what the commands and the jobs import sooner or later."""
    from app.catalog import COMMANDS
    from trainer.contract.jobs import JOBS

    for name in MODULES:
        importlib.import_module(name)
    for name in JOBS.names:
        JOBS.load(name)
    for module in COMMANDS.values():
        importlib.import_module(module)
    gc.collect()
    gc.freeze()


def serve(channel: socket.socket) -> None:
    """Fork until the other side is gone."""
    while True:
        content, descriptors, _, _ = socket.recv_fds(channel, MAX_BYTES, 3)
        if not content:
            return
        reading, writing = os.pipe()
        between = os.fork()
        if not between:
            pid = os.fork()
            if not pid:
                own = json.loads(content)
                become(Start(**(own | {"streams": tuple(descriptors)})))
            os.write(writing, str(pid).encode())
            os._exit(0)
        os.close(writing)
        for descriptor in descriptors:
            os.close(descriptor)
        os.waitpid(between, 0)
        with os.fdopen(reading, "rb") as answer:
            channel.sendall(answer.read())


if __name__ == "__main__":
    load()
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        channel.sendall(b"ready")
        serve(channel)
