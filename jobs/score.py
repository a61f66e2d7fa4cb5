"""`python jobs/score.py ...` is `raycascade score ...`, for `ray job submit`."""

import sys

from raycascade.cli import run

if __name__ == "__main__":
    sys.exit(run(["score", *sys.argv[1:]]))
