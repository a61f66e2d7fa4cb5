"""`python jobs/compare.py ...` is `raycascade compare ...`, for `ray job submit`."""

import sys

from raycascade.cli import run

if __name__ == "__main__":
    sys.exit(run(["compare", *sys.argv[1:]]))
