"""Shards of made-up requests, for benchmarks of the training loop."""

import pyarrow as pa

from raycascade import storage
from raycascade.fitting import FitPart
from raycascade.schema import FeatureSchema
from raycascade.shards import Shards, publish, write_part


def publish_shards(root: str, schema: FeatureSchema, requests: pa.Table, items: pa.Table, *, as_of_ms: int) -> Shards:
    """One version with one training file."""
    part = FitPart(schema)
    part.add_requests(requests, where="benchmark")
    part.add_items(items, where="benchmark")
    state = part.finish(items, as_of_ms=as_of_ms)
    folder = storage.join(root, "v-1")
    state.save(storage.join(folder, "features"))
    encoded = {"requests/train": state.encode_requests(requests, where="requests"),
               "items": state.encode_items(items, where="items")}
    for prefix, table in encoded.items():
        write_part(storage.join(folder, prefix, "part-00000.parquet"), iter([table]))
    publish(root, "v-1", {"requests": {"train": len(requests)}, "fingerprint": schema.fingerprint()})
    return Shards.open(root)
