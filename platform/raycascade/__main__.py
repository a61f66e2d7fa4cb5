"""`python -m raycascade` is the console script."""

from raycascade.cli import main

if __name__ == "__main__":
    main()
