"""What runs in a replica: a stage, or the gateway, each with the bundles that it holds, and how another one comes in.

A deployment is prepared everywhere before anything changes: every replica loads the new bundle beside the old one and
checks it (`prepare`), then the release is written, the gateways change over (`activate`), and the old version goes once
its requests have ended (`retire`, `forget`). A replica that was not asked, because it began in that moment, finds the
release by itself (`look`).
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple

import pyarrow as pa
import torch

from raycascade import selfcheck
from raycascade.bundle import Bundle, load_bundle, stated_version, verify
from raycascade.cascade import search_margin
from raycascade.errors import BundleError, NotReady, RaycascadeError
from raycascade.serving.batching import Batcher
from raycascade.serving.gateway import Gateway
from raycascade.serving.lanes import Lanes
from raycascade.serving.logs import request_in, within
from raycascade.serving.options import ServeOptions
from raycascade.serving.served import ServedModel, require_same_stages
from raycascade.serving.stages import (
    Lost,
    Stage,
    StageServer,
    Survivors,
    most_excluded,
    split,
    stacked,
    unpack,
    version_of,
)
from raycascade.serving.telemetry import NoTelemetry, Telemetry
from raycascade.serving.traffic import TrafficLog
from raycascade.serving.versions import read_release, write_release

logger = logging.getLogger(__name__)
CHECK_S = 60.0  # the most that a self-check through all stages may take
LONGEST_S = 70.0  # longer than any deadline of a request
PREPARE_S = 900.0  # the most that a deployment waits for the replicas to load and check a bundle
PREPARED_S = 2 * PREPARE_S + 300.0  # how long one that is prepared is kept: all stages come first, then gateways
KEPT_S = 120.0  # how long a stage keeps a version that is not released behind the last request for it


def released_bundle(release: str, otherwise: str) -> str:
    """The bundle that the release points to, or another one where there is no release yet."""
    found = read_release(release)
    return found.bundle if found else otherwise


class _Call(NamedTuple):
    version: str
    table: pa.Table
    before: Survivors | None


class StageReplica:
    """A stage of one or more bundles by version, and a batcher that joins what several gateways send.

    Loads the released bundle (`uri` where there is none) and passes its part of the self-check before it is there."""

    def __init__(self, uri: str, name: str, options: ServeOptions, release: str) -> None:
        own = options.stage(name)
        torch.set_num_threads(own.threads)
        self.name, self._release = name, release
        server = checked_stage(released_bundle(release, uri), name)
        self._servers = {server.bundle.version: server}
        self._kept_until: dict[str, float] = {}  # of versions that are not released
        self._released = ""  # as it was when it was looked at last
        self._lanes = Lanes(own.batch.in_flight or 1)
        self._batcher = Batcher(self._run_batch, options=own.batch, in_flight=1, max_queued=own.max_queued, name=name)
        self._loading = asyncio.Lock()
        self._looking: asyncio.Task[None] | None = None

    @property
    def held(self) -> tuple[str, ...]:
        """The versions that are loaded."""
        return tuple(self._servers)

    async def run(self, message: bytes, before: Survivors | None, left_s: float) -> Survivors:
        """The survivors of requests as they travel (`pack`). Lost where no bundle of their version is held here,
        DeadlineExceeded where the caller's seconds are over, Overloaded where too many wait."""
        table = unpack(message)
        version = version_of(table)
        if version not in self._servers:
            self.look()
            raise Lost(f"{self.name}: version {version} is not loaded here")
        self._keep(version, KEPT_S)
        call = _Call(version, table, None if before is None else Survivors(*before))
        searched = None if before is not None else search_margin(most_excluded(table))
        key = (version, tuple(table.schema.names), tuple(table.schema.types), searched)
        with within(request_in(table.schema.metadata), stage=self.name):
            return await self._batcher.submit(call, deadline=time.monotonic() + left_s, size=len(table), key=key)

    async def prepare(self, uri: str) -> str:
        """Loads a bundle beside the others and checks it; its version. BundleError changes nothing."""
        async with self._loading:
            version = await asyncio.to_thread(stated_version, uri)
            if version in self._servers:
                await asyncio.to_thread(verify, uri)  # this copy of it may be damaged
            else:
                self._servers[version] = await asyncio.to_thread(checked_stage, uri, self.name)
            self._keep(version, PREPARED_S)
            return version

    def _keep(self, version: str, seconds: float) -> None:
        self._kept_until[version] = max(self._kept_until.get(version, 0.0), time.monotonic() + seconds)

    async def refuse(self, uri: str) -> None:
        """Lets go of a bundle that was prepared in vain, also of one that is still being loaded."""
        with suppress(RaycascadeError):
            async with self._loading:
                await self.forget(await asyncio.to_thread(stated_version, uri))

    async def forget(self, version: str) -> None:
        """Lets go of a version, unless it is the only one or released."""
        found = await asyncio.to_thread(read_release, self._release)
        if len(self._servers) > 1 and (found is None or found.version != version):
            self._servers.pop(version, None)
            self._kept_until.pop(version, None)

    def look(self) -> None:
        """Begins to look at the release, unless that is going on: loads what is released, forgets what is not."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self._follow())

    async def _follow(self) -> None:
        try:
            found = await asyncio.to_thread(read_release, self._release)
            if found is None:
                return
            if found.version not in self._servers:
                await self.prepare(found.bundle)
            if found.version != self._released:  # some gateways may still have to change over
                self._released = found.version
                for version in self._servers:
                    self._keep(version, KEPT_S)
            now = time.monotonic()
            for version in [one for one in self._servers if self._kept_until.get(one, 0.0) < now]:
                await self.forget(version)
        except Exception as error:
            _complain(f"stage {self.name}", error)

    async def _run_batch(self, calls: list[_Call], deadline: float) -> list[Survivors]:
        del deadline  # a computation that has begun is not interrupted
        server = self._servers.get(calls[0].version)
        if server is None:
            raise Lost(f"{self.name}: version {calls[0].version} is not loaded here any more")
        alone = len(calls) == 1 and len(calls[0].table) == 1
        return await self._lanes.run(_compute, server, calls, small=alone)


def _compute(server: StageServer, calls: list[_Call]) -> list[Survivors]:
    tables = [call.table.replace_schema_metadata() for call in calls]
    table = tables[0] if len(tables) == 1 else pa.concat_tables(tables).combine_chunks()
    survivors = server.run(server.bundle.batch(table), stacked([call.before for call in calls]))
    return split(survivors, [len(one) for one in tables])


def checked_stage(uri: str, name: str) -> StageServer:
    """A stage of a bundle that has passed its part of the self-check. BundleError for a bundle that is damaged, lacks
    the stage, or answers otherwise than recorded."""
    bundle = load_bundle(uri, served=(name,))
    if name not in bundle.cascade.names:
        raise BundleError(f"{uri}: it has no stage {name!r}, which is deployed (its stages are "
                          f"{', '.join(bundle.cascade.names)}); serve it anew instead of swapping it in")
    server = StageServer(bundle, name)
    check = selfcheck.read(bundle)
    if check is not None:
        before = None
        if (position := bundle.cascade.names.index(name)) > 0:
            stage_before = bundle.cascade.names[position - 1]
            before = Survivors(check.rows[stage_before], check.scores[stage_before])
        check.require(name, *server.run(bundle.batch(check.encoded), before))
    return server


class GatewayReplica:
    """The gateway of one or more bundles. `stages_of` gives the stages that answer for a bundle: near ones, which
    compute in the lanes, or those behind handles. Loads the released bundle (`uri` where there is none).

    Fused, it passes the whole self-check before it is there; composed, its encoding must be as recorded, since a
    gateway must come back while a stage is away, and the stages check themselves."""

    def __init__(
        self, uri: str, names: tuple[str, ...], stages_of: Callable[[Bundle, Lanes], Mapping[str, Stage]],
        options: ServeOptions, release: str, *, telemetry: Telemetry | None = None,
    ) -> None:
        traffic = options.traffic
        torch.set_num_threads(options.gateway.threads)
        self._names, self._stages_of, self._options, self.release = names, stages_of, options, release
        self._telemetry = telemetry or NoTelemetry()
        bundle = self._load(released_bundle(release, uri))
        self._traffic = TrafficLog(
            traffic.uri, sample=traffic.sample, rotate_s=traffic.rotate_s, rotate_rows=traffic.rotate_rows,
            telemetry=self._telemetry) if traffic.uri else None
        self._lanes = Lanes(options.gateway.waves)
        self.gateway = Gateway(bundle, stages_of(bundle, self._lanes), options, telemetry=self._telemetry,
                               traffic=self._traffic, lanes=self._lanes)
        self.gateway.active.checked = _check_here(bundle, whole=options.mode == "fused")
        self._kept_until: dict[str, float] = {}  # of versions that are prepared and not served
        self._loading = asyncio.Lock()
        self._looking: asyncio.Task[None] | None = None

    async def prepare(self, uri: str) -> str:
        """Loads a bundle beside the others and passes its self-check through all stages; its version. BundleError, or
        NotReady where a stage does not answer, and nothing has changed."""
        async with self._loading:
            version = await asyncio.to_thread(stated_version, uri)
            if version in self.gateway.versions.held:
                await asyncio.to_thread(verify, uri)  # this copy of it may be damaged
            else:
                bundle = await asyncio.to_thread(self._load, uri)
                model = ServedModel(bundle, self._stages_of(bundle, self._lanes), self._options, self._lanes)
                try:
                    async with asyncio.timeout(CHECK_S):
                        model.checked = await model.passes_selfcheck(deadline=time.monotonic() + CHECK_S)
                except TimeoutError:
                    raise NotReady(f"{uri}: the self-check through all stages was not done in {CHECK_S:g} s; the old "
                                   "bundle is served; try again when there is less to do") from None
                self.gateway.versions.add(model)
            if version != self.gateway.active.version:
                self._kept_until[version] = time.monotonic() + PREPARED_S
            return version

    async def activate(self, version: str) -> None:
        """Answers new requests with a version that is prepared; one that is not is looked for in the release."""
        if version not in self.gateway.versions.held:
            self.look()
        elif self.gateway.active.version != version:
            self.gateway.activate(version)
            self._kept_until.pop(version, None)
            self._telemetry.swap("swapped")

    async def refuse(self, uri: str) -> None:
        """Counts a deployment that did not come to be, and lets go of its bundle, also where it is still loading."""
        self._telemetry.swap("refused")
        with suppress(RaycascadeError):
            async with self._loading:
                await self.retire(await asyncio.to_thread(stated_version, uri), 0.0)

    async def release_to(self, uri: str, version: str) -> None:
        """Writes the release: from now on replicas that start, or look, serve this version."""
        await asyncio.to_thread(write_release, self.release, bundle=uri, version=version)

    async def retire(self, version: str, timeout_s: float) -> bool:
        """Lets go of a version that is not active once its requests have ended; whether they have in time."""
        return await self.gateway.versions.retire(version, timeout_s=timeout_s)

    def look(self) -> None:
        """Begins to look at the release, unless that is going on: changes over to what it says, and lets go of what is
        neither served nor about to be."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self._follow())

    async def close(self) -> None:
        """Ends the connections of the user store and writes what the traffic log holds."""
        await self.gateway.users.close()
        if self._traffic is not None:
            await asyncio.to_thread(self._traffic.close)

    async def _follow(self) -> None:
        try:
            found = await asyncio.to_thread(read_release, self.release)
            active = self.gateway.active.version
            if found is not None and found.version != active:
                await self.prepare(found.bundle)
                await self.activate(found.version)
            now = time.monotonic()
            for version in self.gateway.versions.held:
                if self._kept_until.get(version, 0.0) < now:
                    await self.retire(version, LONGEST_S)
        except Exception as error:
            _complain("the gateway", error)

    def _load(self, uri: str) -> Bundle:
        bundle = load_bundle(uri, served=None if self._options.mode == "fused" else ())
        bundle.cascade.require_search()
        if self._options.mode == "composed":
            require_same_stages(bundle, self._names)
        len(bundle.users.table)  # read now, not with the first request
        return bundle


def _complain(who: str, error: Exception) -> None:
    """One line in the log for what somebody outside can mend; all of it for a mistake of ours."""
    expected = isinstance(error, RaycascadeError | OSError)
    logger.error("%s cannot follow the release: %s", who, error, exc_info=None if expected else error)


def _check_here(bundle: Bundle, *, whole: bool) -> bool:
    """Whether there was a self-check to pass in this process; BundleError where it fails."""
    if whole:
        return selfcheck.require_whole(bundle)
    check = selfcheck.read(bundle)
    if check is not None:
        check.require_encoding(bundle.encode(check.requests))
    return check is not None
