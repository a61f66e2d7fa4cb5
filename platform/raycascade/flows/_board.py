"""What the workers of a training tell the driver. A module of its own, so that its process need not import torch."""


class Board:
    """Where rank 0 posts how far it is, and what a user has to mend; the driver reads it."""

    def __init__(self) -> None:
        self.latest: tuple[int, int, int, int, float] | None = None
        self.failure: tuple[str, str] | None = None

    def post(self, latest: tuple[int, int, int, int, float]) -> None:
        """Epoch, step, steps of an epoch, rows and seconds."""
        self.latest = latest

    def fail(self, kind: str, message: str) -> None:
        """The name of an error's class, and its message; the first one stays."""
        self.failure = self.failure or (kind, message)

    def read(self) -> tuple[int, int, int, int, float] | None:
        """What was posted last."""
        return self.latest

    def read_failure(self) -> tuple[str, str] | None:
        """What was failed with, if anything."""
        return self.failure
