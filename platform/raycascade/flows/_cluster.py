"""Ray for the verbs: connecting, and one function that runs a task per element with Ray Data."""

import json
import logging
import os
from collections.abc import Callable
from typing import Any

import raycascade.errors
from raycascade import storage
from raycascade.errors import RaycascadeError, ResourceError

MOST_ATTEMPTS = 4  # of one task: Ray Data starts a task whose process died again, without end


def connect(address: str | None = None) -> None:
    """Connects to a cluster, or starts a local Ray that is quiet and listens on loopback. Does nothing if connected."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Idle workers of a finished verb would keep their imports, some hundred megabytes each, through the next one.
    os.environ.setdefault("RAY_num_workers_soft_limit", "1")
    import ray

    if ray.is_initialized():
        return
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        return
    cores = os.cpu_count() or 1
    # Actors hold logical CPUs while reads need one too: without spare ones a job on a small machine waits for itself.
    ray.init(num_cpus=cores + 2, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING,
             object_store_memory=512 << 20)


def each(function: Callable[[Any], Any], elements: list[Any], *, notes: str) -> list[Any]:
    """`function(element)` for every element as Ray Data tasks, results in the elements' order.

    Elements and results are JSON values. An error that a user can cause comes back as itself, with its one line.
    `notes` is a folder for this call alone, where every attempt leaves a note: ResourceError where a task's process
    dies MOST_ATTEMPTS times.
    """
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def run(row: dict[str, Any]) -> dict[str, Any]:
        try:
            note_attempt(notes, row["number"])
            value = json.dumps(function(json.loads(row["element"])))
            return {"number": row["number"], "value": value, "error": "", "message": ""}
        except RaycascadeError as error:
            return {"number": row["number"], "value": "", "error": type(error).__name__, "message": str(error)}

    rows = [{"number": number, "element": json.dumps(element)} for number, element in enumerate(elements)]
    done = ray.data.from_items(rows, override_num_blocks=max(1, len(rows))).map(run).take_all()
    done.sort(key=lambda row: row["number"])
    for row in done:
        if row["error"]:
            raise getattr(raycascade.errors, row["error"])(row["message"])
    assert len(done) == len(elements), (len(done), len(elements))
    return [json.loads(row["value"]) for row in done]


def note_attempt(notes: str, number: int) -> None:
    """Notes that a task begins; ResourceError where it has begun too often before, so its process died each time."""
    for attempt in range(MOST_ATTEMPTS):
        note = storage.join(notes, f"{number:05d}-{attempt}")
        if not storage.exists(note):
            storage.write_bytes(note, b"")
            return
    raise ResourceError(f"task {number} died {MOST_ATTEMPTS} times; most often a process is ended for want of memory: "
                        "use workers with more memory, or fewer at a time")


def gather(function: Callable[[Any], Any], elements: list[Any]) -> list[Any]:
    """`function(element)` for each element as Ray tasks; any Python objects. A user's errors come back as they are."""
    import ray
    from ray.exceptions import RayTaskError

    task = ray.remote(max_retries=1)(function)
    try:
        return ray.get([task.remote(element) for element in elements])
    except RayTaskError as error:
        if isinstance(error.cause, RaycascadeError):
            raise error.cause from None
        raise


def num_cores() -> int:
    """CPU cores of the cluster that is connected, spare logical ones of a local Ray left out."""
    import ray

    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    return max(1, (os.cpu_count() or 1) if nodes == 1 else int(ray.cluster_resources().get("CPU", 1)))
