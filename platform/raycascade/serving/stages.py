"""One stage of a served cascade, and what travels between stages: the encoded requests and compact arrays of item rows.

The same class runs in a replica of its own (composed) or beside the others in one replica (fused).
"""

import asyncio
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from raycascade.bundle import Bundle, load_bundle
from raycascade.cascade import StageOutcome
from raycascade.errors import BundleError
from raycascade.schema import PADDING

VERSION = b"bundle"  # in the metadata of what travels


class Survivors(NamedTuple):
    """What a stage lets through, best first: item rows (int32, 0 = none) and the stage's scores (float32)."""

    rows_QK: np.ndarray
    scores_QK: np.ndarray


class Stage(Protocol):
    """A stage as the gateway sees it, near or far."""

    async def run(self, requests: bytes, before: Survivors | None) -> Survivors:
        """The survivors among `before`; None: the stage searches the whole catalogue."""
        ...

    async def ready(self) -> bool:
        """Whether the stage can answer."""
        ...


class StageServer:
    """One stage of a bundle. Its methods block and are safe to call from several threads."""

    def __init__(self, bundle: Bundle | str, name: str) -> None:
        self.bundle = load_bundle(bundle, served=(name,)) if isinstance(bundle, str) else bundle
        self.name = name
        self._keep = self.bundle.cascade.keeps[self.bundle.cascade.names.index(name)]

    def run(self, requests: bytes, before: Survivors | None) -> Survivors:
        """The survivors of encoded requests (`pack`); BundleError where another bundle has encoded them."""
        table = unpack(requests)
        version = (table.schema.metadata or {}).get(VERSION, b"").decode()
        if version and version != self.bundle.version:
            raise BundleError(f"{self.bundle.uri}: stage {self.name!r} got requests that another bundle has encoded "
                              f"(version {version}, here {self.bundle.version}); serve one bundle")
        cascade, batch = self.bundle.cascade, self.bundle.batch(table)
        if before is None:
            outcome = cascade.retrieve(batch, self.bundle.index)
        else:
            rows_QK = before.rows_QK.astype(np.int64)
            scores_QK = before.scores_QK.copy()  # what came from another process is read-only
            seen = StageOutcome("before", rows_QK.shape[1], rows_QK, scores_QK, rows_QK != PADDING)
            outcome = cascade.narrow(self.name, self._keep, batch, seen, self.bundle.items)
        rows_QK, mask_QK = outcome.kept()
        return Survivors(np.where(mask_QK, rows_QK, PADDING).astype(np.int32), outcome.scores_QC[:, :self._keep])

    def ready(self) -> bool:
        """True once the bundle is loaded, which the constructor waits for."""
        return True


class LocalStage:
    """A stage in this process: plain calls in a thread, so that the event loop stays free."""

    def __init__(self, server: StageServer) -> None:
        self._server = server

    async def run(self, requests: bytes, before: Survivors | None) -> Survivors:
        """The stage's survivors."""
        return await asyncio.to_thread(self._server.run, requests, before)

    async def ready(self) -> bool:
        """Always."""
        return self._server.ready()


class RemoteStage:
    """A stage in replicas of its own, behind a deployment handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def run(self, requests: bytes, before: Survivors | None) -> Survivors:
        """The stage's survivors."""
        return Survivors(*await self._handle.run.remote(requests, before))

    async def ready(self) -> bool:
        """Whether a replica answers."""
        return await self._handle.ready.remote()


def pack(requests: pa.Table, *, version: str = "") -> bytes:
    """Encoded requests as an Arrow stream, with the version of the bundle that has encoded them."""
    requests = requests.replace_schema_metadata({VERSION: version.encode()} if version else None)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, requests.schema) as writer:
        writer.write_table(requests)
    return sink.getvalue().to_pybytes()


def unpack(requests: bytes) -> pa.Table:
    """The inverse of `pack`."""
    return pa.ipc.open_stream(requests).read_all()
