"""One app in a browser: `python -m app.web.session RUNS_DIR [--view]`, started by `server.py`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.contract.errors import MenmaError

WATCH_S = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the app for the server that started this process; end with it."""
    parser = argparse.ArgumentParser(prog="python -m app.web.session", description=__doc__)
    parser.add_argument("runs_dir", type=Path)
    parser.add_argument("--view", action="store_true")
    options = parser.parse_args(arguments)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    from app.tui.app import run_app

    try:
        run_app(options.runs_dir, read_only=options.view)
    except MenmaError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def _end_with(server: int) -> None:
    """End this process when its server is gone: nobody would close it any more."""
    while os.getppid() == server:
        time.sleep(WATCH_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10 * WATCH_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
