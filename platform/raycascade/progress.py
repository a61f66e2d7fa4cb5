"""One line on standard error that says how far a verb is: share, rows per second, time left."""

import sys
import time


class ProgressLine:
    """Rewrites itself on a terminal; elsewhere (logs, CI) a new line at most every ten seconds."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._terminal = sys.stderr.isatty()
        self._last_s = 0.0

    def show(self, share: float, rows: int, seconds: float, *, detail: str = "") -> None:
        """`share` of the work is done; `rows` were handled in `seconds`."""
        now = time.monotonic()
        if not self._terminal and now - self._last_s < 10.0:
            return
        self._last_s = now
        left_s = seconds / share * (1.0 - share) if share > 0 else float("nan")
        text = f"{self.label}: {share:6.1%}  {rows / max(seconds, 1e-9):,.0f} rows/s  {left_s:,.0f} s left  {detail}"
        sys.stderr.write(f"\r{text:<100}" if self._terminal else f"{text.rstrip()}\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Ends the line."""
        if self._terminal and self._last_s:
            sys.stderr.write("\n")
