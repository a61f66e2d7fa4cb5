"""`python jobs/evaluate.py ...` is `raycascade evaluate ...`, for `ray job submit`."""

import sys

from raycascade.cli import run

if __name__ == "__main__":
    sys.exit(run(["evaluate", *sys.argv[1:]]))
