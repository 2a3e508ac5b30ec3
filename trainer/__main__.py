"""`python -m trainer JOB REQUEST.json`: run one job headless."""

from __future__ import annotations

import sys

from trainer.jobs.base import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
