"""RecFlow (Liu et al., ICLR 2025): candidates of every stage of a real cascade, official files as they are.

Files below paths.raw: `all_stage/`, `request_id_dict/`, `seq_effective_50_dict/` (one file a day, Feather and pickle)
and `others/id_cnt.pkl`; docs/recflow.md says where they come from. The data are for non-commercial use. Pickles are
read by `_recflow_pickle.py`, which executes nothing; only `prepare` reads them.

A request's lists follow a protocol: the two of LCRON (Wang et al., arXiv 2503.09492), or every logged candidate with
its deepest level. Days count in UTC+8, whatever the zone of the machine.
"""

import datetime as dt
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache, cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field as Option, model_validator

from raycascade.datasets._recflow_day import LABELS, UTC_OFFSET_HOURS, read_day
from raycascade.datasets._recflow_files import ALL_STAGE, HISTORIES, LISTS, PERIODS, REALSHOW, RecflowFiles
from raycascade.datasets._recflow_items import Catalogue
from raycascade.datasets._recflow_lists import ITEM_FIELDS, PAPER_CODES, PROTOCOLS, Rules, entries_of
from raycascade.errors import ConfigError, DataError
from raycascade.plugins import PluginConfig
from raycascade.schema import ClockFeature, Feature, FeatureSchema, HistoryFeature, IdFeature

HISTORY_FIELDS = [0, 1, 3, 2, 4, 5, 6]  # columns of a history row, in the order in which ITEM_FIELDS names them
PUBLISHED_FIELDS = ("item_id", "author_id", "category_level_two", "category_level_one", "upload_type")
PARTS = ("weekday", "hour", "minute")
UNHASHED = 1 << 31  # distinct ids of a compact vocabulary
NOTICE = ("RecFlow: data of Kuaishou (Liu et al., ICLR 2025, github.com/RecFlow-ICLR/RecFlow), CC BY-SA 4.0 by its "
          "repository and CC BY-NC-SA 4.0 by its paper. Treat it as non-commercial and share-alike, and pass on no row "
          "of it.")


class RecflowDataset:
    """Requests with the candidates of every stage. `notes` counts what reading found and settled, by message."""

    form: Literal["requests"] = "requests"

    class Config(PluginConfig):
        """Options of `dataset: {name: recflow}`."""

        protocol: Literal["lcron_two_stage", "lcron_three_stage", "full"] = "lcron_two_stage"
        source: Literal["request_dict", "all_stage"] = "request_dict"  # of the lists
        period: Literal[1, 2] | None = None  # 2024-01-13 to 02-04, or 02-05 to 02-18
        first_day: dt.date | None = None  # None: the period's, or the first there is
        last_day: dt.date | None = None
        per_group: int = Option(default=10, ge=1)  # candidates of each group of an LCRON list
        negative_codes: Literal["code", "paper"] = "code"  # relevance 7, 6, 5 or 9, 8, 7
        short_list: Literal["keep", "drop", "raise"] = "keep"  # requests with a group of fewer candidates
        dedupe: Literal["none", "deepest"] = "none"  # a video that stands in two groups of a list
        missing_days: Literal["refuse", "skip"] = "refuse"
        missing_history: Literal["refuse", "empty"] = "refuse"
        missing_rank: Literal["refuse", "last"] = "refuse"
        history_len: int = Option(default=50, ge=1)
        id_buckets: int | None = Option(default=None, ge=1)  # hash videos, authors, users and devices; None: as fitted
        positive: Literal["", "effective_view", "long_view", "like", "follow", "forward", "comment"] = ""

        @model_validator(mode="after")
        def _possible(self) -> "RecflowDataset.Config":
            if self.negative_codes == "paper" and self.protocol != "lcron_two_stage":
                raise ConfigError("negative_codes: paper is for lcron_two_stage, the paper has no others; use code")
            first, last = self.bounds()
            if first and last and first > last:
                raise ConfigError(f"first_day {first} must not lie after last_day {last}")
            return self

        def bounds(self) -> tuple[dt.date | None, dt.date | None]:
            """The first and the last day; None: whatever there is."""
            first, last = PERIODS[self.period] if self.period else (None, None)
            return self.first_day or first, self.last_day or last

    def __init__(self, config: Config, *, raw: str) -> None:
        self.config, self.raw = config, raw
        self.notes: Counter[str] = Counter()
        self.files = RecflowFiles(raw, self.notes)

    @cached_property
    def rules(self) -> Rules:
        """The options that decide about lists and histories."""
        config = self.config
        protocol = PROTOCOLS.get(config.protocol)
        if protocol and config.negative_codes == "paper":
            protocol = type(protocol)(protocol.groups, protocol.rank, PAPER_CODES)
        return Rules(protocol, config.source, config.per_group, config.short_list, config.dedupe,
                     config.missing_history, config.missing_rank, config.history_len)

    def schema(self) -> FeatureSchema:
        """The published fields: ids and clocks of user, request and video; five fields of each past video."""
        buckets = self.config.id_buckets

        def many(name: str, side: Literal["user", "item"]) -> IdFeature:
            return IdFeature(name=name, side=side, buckets=buckets, max_values=UNHASHED)

        features: list[Feature] = [
            many("user_id", "user"), many("device_id", "user"),
            *(IdFeature(name=name, side="user") for name in ("gender", "age", "province")),
            *(ClockFeature(name=part, part=part, utc_offset_hours=UTC_OFFSET_HOURS) for part in PARTS),
            many("item_id", "item"), many("author_id", "item"),
            *(IdFeature(name=name, side="item") for name in PUBLISHED_FIELDS[2:]),
            *(ClockFeature(name=f"upload_{part}", part=part, side="item", source="upload_ms", table=part,
                           utc_offset_hours=UTC_OFFSET_HOURS) for part in PARTS),
            HistoryFeature(max_len=self.config.history_len, fields=PUBLISHED_FIELDS),
        ]
        return FeatureSchema(features=tuple(features), labels=LABELS, positive=self.config.positive,
                             utc_offset_hours=UTC_OFFSET_HOURS)

    def slices(self) -> list[str]:
        """The days, `YYYY-MM-DD`."""
        _print_notice()
        days, lacking = self._days
        for file in lacking:
            self.notes[f"day left out, because {file} is missing (missing_days: skip)"] += 1
        return days

    @cached_property
    def _days(self) -> tuple[list[str], list[str]]:
        partial = ALL_STAGE not in self.files.folders and REALSHOW in self.files.folders
        kinds = [REALSHOW if partial and self.rules.protocol is None else ALL_STAGE, HISTORIES]
        if self._from_lists:
            kinds.append(LISTS)
        first, last = self.config.bounds()
        return self.files.days(tuple(kinds), first=first, last=last, missing=self.config.missing_days)

    @property
    def _from_lists(self) -> bool:
        return self.rules.protocol is not None and self.rules.source == "request_dict"

    def items(self) -> pa.Table:
        """Every video that is a candidate or in a history, with the fields of its first appearance."""
        catalogue = Catalogue(self.notes)
        files = RecflowFiles(self.raw, Counter())  # what it notes, `read` will note again
        for day in self._days[0]:
            for fields_EF in self._candidate_fields(files, day):
                catalogue.add(fields_EF, day)
            for _, events_RLF in files.read_histories(files.file(HISTORIES, day)):
                catalogue.add(events_RLF[events_RLF[:, :, 7] > 0][:, HISTORY_FIELDS], day)
        for column, name in enumerate(ITEM_FIELDS[:5]):
            self.files.check_ids(name, catalogue.column(column), "the videos of all days")
        return catalogue.table()

    def _candidate_fields(self, files: RecflowFiles, day: str) -> Iterator[np.ndarray]:
        if self._from_lists:
            assert self.rules.protocol is not None
            for lists in files.read_lists(files.file(LISTS, day)):
                yield entries_of(lists, self.rules.protocol.groups, self.rules.per_group)[1]
            return
        kind = ALL_STAGE if ALL_STAGE in files.folders else REALSHOW
        for columns in files.read_columns(files.file(kind, day), ITEM_FIELDS):
            yield np.stack([columns[name] for name in ITEM_FIELDS], axis=1)

    def read(self, piece: str) -> Iterator[pa.Table]:
        """The requests of a day."""
        if piece not in self._days[0]:
            raise DataError(f"recflow: there is no piece {piece!r}; pieces are days such as {self._days[0][0]}")
        return read_day(self.files, piece, self.rules)

    def test_set(self, stage: Literal["retrieval", "coarse_rank", "rank"]) -> Iterator[pa.Table]:
        """RecFlow's own test set of a stage in tables, columns as they are but for spaces; no protocol uses it."""
        yield from self.files.read_tables(self.files.test_set(stage))


@cache
def _print_notice() -> None:
    """Once a process."""
    sys.stderr.write(f"{NOTICE}\n")
