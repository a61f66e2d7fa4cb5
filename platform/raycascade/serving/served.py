"""A bundle as it is served: loaded, with its stages, and what stands in where the first stage cannot answer."""

import asyncio
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from raycascade import selfcheck
from raycascade.bundle import Bundle
from raycascade.errors import BundleError, DataError
from raycascade.evaluation import Popularity
from raycascade.schema import FIRST_ROW, PADDING, DenseFeature, IdFeature
from raycascade.serving.answers import ItemView, Scored
from raycascade.serving.encoded import raw_column
from raycascade.serving.joint_encoding import JointEncoder
from raycascade.serving.lanes import Lanes
from raycascade.serving.options import ServeOptions
from raycascade.serving.requests import ids_as
from raycascade.serving.stages import EncodedRequests, LocalStage, OneRequest, Stage, Survivors


class ServedModel:
    """One version. A request takes the version that is active when it arrives and keeps to it until its answer."""

    def __init__(
        self, bundle: Bundle, stages: Mapping[str, Stage], options: ServeOptions | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        assert tuple(stages) == bundle.cascade.names, (tuple(stages), bundle.cascade.names)
        self.bundle = bundle
        self.stages = stages
        self.version = bundle.version
        options = options or ServeOptions()
        fused = options.mode == "fused"
        near = [stage for stage in stages.values() if type(stage) is LocalStage]  # others answer in their own way
        self.encoder = JointEncoder(bundle, options.stage("default"), lanes=lanes,
                                    waves=options.gateway.waves if fused else None,
                                    near=near if fused and len(near) == len(stages) else ())
        self.checked = False  # whether a self-check was passed
        self.num_running = 0  # requests that are on their way

    @property
    def name(self) -> str:
        """The bundle's id: the last part of its URI."""
        return self.bundle.uri.rstrip("/").rsplit("/", 1)[-1]

    @property
    def most(self) -> int:
        """How many items an answer can hold."""
        return self.bundle.cascade.keeps[-1]

    @cached_property
    def popularity(self) -> Popularity | None:
        """What was popular at the end of the training log; None where the log counted nothing."""
        popularity = Popularity(self.bundle.items, self.bundle.config.evaluate.popularity_hours)
        return popularity if (popularity.scores_N[FIRST_ROW:] > 0).any() else None

    def popular(self, request: OneRequest) -> Survivors | None:
        """The most popular items that the request does not exclude, as many as an answer holds; scores are counts."""
        if self.popularity is None:
            return None
        table = request.group.table
        banned = table["exclude"][request.row].as_py() if "exclude" in table.column_names else None
        excluded = np.array(banned or [], np.int64)
        rows_QK = self.popularity.top((excluded,), self.most)
        return Survivors(rows_QK.astype(np.int32), self.popularity.scores_N[rows_QK].astype(np.float32))

    def scored(self, survivors: Survivors, most: int) -> list[Scored]:
        """Raw ids and scores of a single request, best first, at most so many."""
        rows, scores = survivors.rows_QK[0], survivors.scores_QK[0]
        real = rows >= FIRST_ROW
        ids: list[Any] = self.bundle.items.ids_of(rows[real][:most])
        return [Scored.model_construct(item_id=item, score=score)
                for item, score in zip(ids, scores[real][:most].tolist(), strict=True)]

    async def passes_selfcheck(self, *, deadline: float) -> bool:
        """Whether there was a self-check to pass, through encoding and all stages as they are reached from here;
        BundleError where it fails."""
        check = await asyncio.to_thread(selfcheck.read, self.bundle)
        if check is None:
            return False
        encoded = await asyncio.to_thread(self.bundle.encode, check.requests)
        check.require_encoding(encoded)
        group = EncodedRequests(encoded, self.bundle)
        for row in range(len(encoded)):
            request, survivors = OneRequest(group, row), None
            for name, stage in self.stages.items():
                survivors = await stage.run(request, survivors, deadline=deadline)
                check.require(name, survivors.rows_QK, survivors.scores_QK, first=row)
        return True

    # ---------------------------------------------------------------- what is known without asking a stage
    def about(self) -> dict[str, Any]:
        """What is served."""
        config, manifest = self.bundle.config, self.bundle.manifest
        stages = [{"name": stage.name, "model": stage.model["name"], "keep": stage.keep} for stage in config.stages]
        return {"model": self.name, "version": self.version, "stages": stages, "items": self.bundle.items.num_items,
                "users": len(self.bundle.users.table), "index": config.index["name"],
                "fingerprint": manifest["fingerprint"], "versions": manifest["versions"], "self_check": self.checked}

    def item_row(self, item_id: int | str) -> int:
        """The row of an item of the catalogue; DataError for another one."""
        keys = self.bundle.items.keys
        (typed,) = ids_as([item_id], keys.type)
        row = int(self.bundle.state.item_ids.lookup(pa.array([typed], keys.type))[0])
        if row < FIRST_ROW:
            raise DataError(f"item_id: {item_id!r} is not in the catalogue of the bundle ({len(keys)} items, such as "
                            f"{keys[0]})")
        return row

    def item(self, item_id: int | str) -> ItemView:
        """What the bundle knows of an item; DataError for one that it does not have."""
        row, state, static = self.item_row(item_id), self.bundle.state, self.bundle.items.static
        counts = {name: float(state.counters.as_of(np.array([row]), state.as_of_ms, name)[0])
                  for name in state.counters.names}
        encoded, features = pa.table({name: _column(values[row]) for name, values in static.items()}), {}
        for feature in state.schema.side("item"):
            if isinstance(feature, IdFeature | DenseFeature):
                (features[feature.name],) = raw_column(encoded, feature, state).to_pylist()
        (raw_id,) = self.bundle.items.ids_of(np.array([row]))
        return ItemView.model_validate({"item_id": raw_id, "model": self.name, "version": self.version,
                                        "features": features, "counts": counts})


def _column(value: np.ndarray) -> pa.Array:
    """An item's value of one field as a column of one row; of several values, those that are there."""
    if np.ndim(value) == 0:
        return pa.array([value])
    return pa.array([value[value != PADDING].tolist()], pa.list_(pa.from_numpy_dtype(value.dtype)))


def require_same_stages(bundle: Bundle, names: tuple[str, ...]) -> None:
    """BundleError where a bundle has other stages than those that are deployed."""
    if bundle.cascade.names != names:
        raise BundleError(f"{bundle.uri}: its stages are {', '.join(bundle.cascade.names)}, but {', '.join(names)} are "
                          "deployed; serve it anew instead of swapping it in")
