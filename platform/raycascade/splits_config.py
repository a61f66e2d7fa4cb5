"""Which requests train, validate and test: boundaries in time."""

import datetime as dt
from itertools import pairwise
from typing import Any

from pydantic import Field as Option, field_validator, model_validator

from raycascade.errors import ConfigError
from raycascade.schema import Frozen


class Splits(Frozen):
    """Requests by time: train before `valid_from` (or `test_from`), then valid, then test up to `test_until`.

    Dates are ISO days or moments, in the zone `utc_offset_hours` unless they name one; null leaves a split out.
    `train_from` drops what is older.
    """

    train_from: str | None = None
    valid_from: str | None = None
    test_from: str | None = None
    test_until: str | None = None
    utc_offset_hours: float = Option(default=0.0, gt=-24, lt=24)

    @field_validator("train_from", "valid_from", "test_from", "test_until", mode="before")
    @classmethod
    def _iso(cls, value: Any) -> Any:
        return value.isoformat() if isinstance(value, dt.date) else value

    @model_validator(mode="after")
    def _ordered(self) -> "Splits":
        moments = [(n, self.moment_ms(n)) for n in ("train_from", "valid_from", "test_from", "test_until")]
        present = [(name, moment) for name, moment in moments if moment is not None]
        for (before, a), (after, b) in pairwise(present):
            if a >= b:
                raise ConfigError(f"splits: {before} ({getattr(self, before)}) must lie before "
                                  f"{after} ({getattr(self, after)})")
        return self

    def moment_ms(self, name: str) -> int | None:
        """A boundary as Unix milliseconds."""
        text = getattr(self, name)
        if text is None:
            return None
        try:
            moment = dt.datetime.fromisoformat(text)
        except ValueError:
            raise ConfigError(f"splits.{name}: expected an ISO date such as 2022-04-30, got {text!r}") from None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=dt.timezone(dt.timedelta(hours=self.utc_offset_hours)))
        return round(moment.timestamp() * 1000)

    def ranges_ms(self) -> dict[str, tuple[int, int]]:
        """Half-open time range of every split there is, in order of time."""
        first, last = -(1 << 62), 1 << 62
        train, valid, test, until = (self.moment_ms(n) for n in ("train_from", "valid_from", "test_from", "test_until"))
        end = last if until is None else until
        starts = {"train": first if train is None else train, "valid": valid, "test": test}
        names = [name for name, start in starts.items() if start is not None]
        ends = [starts[name] for name in names[1:]] + [end]
        return {name: (starts[name], stop) for name, stop in zip(names, ends, strict=True)}  # type: ignore[misc]
