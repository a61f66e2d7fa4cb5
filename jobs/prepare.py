"""`python jobs/prepare.py ...` is `raycascade prepare ...`, for `ray job submit`."""

import sys

from raycascade.cli import run

if __name__ == "__main__":
    sys.exit(run(["prepare", *sys.argv[1:]]))
