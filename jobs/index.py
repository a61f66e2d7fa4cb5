"""`python jobs/index.py ...` is `raycascade index ...`, for `ray job submit`."""

import sys

from raycascade.cli import run

if __name__ == "__main__":
    sys.exit(run(["index", *sys.argv[1:]]))
