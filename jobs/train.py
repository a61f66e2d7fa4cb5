"""`python jobs/train.py ...` is `raycascade train ...`, for `ray job submit`."""

import sys

from raycascade.cli import run

if __name__ == "__main__":
    sys.exit(run(["train", *sys.argv[1:]]))
