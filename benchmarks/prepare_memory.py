"""Memory and speed of `raycascade prepare` on a log that is larger than the memory its workers may use.

A simulated log of `--times` x `--limit-gb` (uncompressed Arrow) becomes shards with two Ray workers. Every worker may
grow to its share of the limit and no further (the kernel refuses it more), and the kernel's own record of each
process's peak is added up. The script fails if the sum of the workers' peaks is above the limit at any time.

    python benchmarks/prepare_memory.py                              a few minutes on two cores
    python benchmarks/prepare_memory.py --limit-gb 2 --times 10      the full size: 20 GB, about 15 million requests
"""

import _thread
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser
from pathlib import Path

import ray
import ray.exceptions

from raycascade import storage
from raycascade.config import Config, parse_config
from raycascade.flows.prepare import open_dataset, prepare

GB = 1 << 30
NUM_WORKERS = 2
SAMPLE_S = 0.2
MOST_PROCESSES = 24  # more were started: workers die, and Ray Data runs their tasks again for ever
LIMIT_VARIABLE = "PREPARE_MEMORY_BYTES_PER_WORKER"


def status_of(process: "int | str") -> dict[str, int]:
    """Sizes in bytes by name (VmHWM, VmRSS, VmData) of a process; empty if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    sizes = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(size) << 10 for name, size, _ in sizes}


def limit_worker() -> None:
    """In each worker as it starts: what it may allocate is its share of the limit less what it holds already."""
    share = int(os.environ[LIMIT_VARIABLE])
    before = status_of("self")
    allowed = before["VmData"] + max(share - before["VmRSS"], 0)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))


def worker_processes(raylet: int) -> list[int]:
    """Children of the raylet that run Python tasks."""
    try:
        children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [int(child) for child in children if _is_worker(int(child))]


def _is_worker(process: int) -> bool:
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return command.startswith(b"ray::") or b"default_worker.py" in command


class Watch(threading.Thread):
    """Adds up the peaks of the workers that are alive, again and again."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.sum_of_peaks, self.peaks, self.ended = 0, dict[int, int](), threading.Event()
        parents = (path for path in Path("/proc").iterdir() if path.name.isdigit())
        mine = [int(path.name) for path in parents if _parent(path) == os.getpid()]
        self._raylet = next(one for one in mine if Path(f"/proc/{one}/comm").read_text().strip() == "raylet")

    def run(self) -> None:
        while not self.ended.wait(SAMPLE_S):
            now = {process: status_of(process).get("VmHWM", 0) for process in worker_processes(self._raylet)}
            self.sum_of_peaks = max(self.sum_of_peaks, sum(now.values()))
            self.peaks |= now
            if len(self.peaks) > MOST_PROCESSES and not self.ended.is_set():
                self.ended.set()
                _thread.interrupt_main()


def _parent(path: Path) -> int:
    try:
        return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def config_of(folder: str, num_users: int, num_items: int) -> Config:
    stages = [{"name": "retriever", "keep": 20, "model": {"name": "two_tower"}},
              {"name": "ranker", "keep": 10, "model": {"name": "mlp"}}]
    return parse_config({
        "paths": {"shards": storage.join(folder, "shards")}, "stages": stages,
        "dataset": {"name": "simulated", "num_users": num_users, "num_items": num_items},
        "splits": {"valid_from": "2024-01-07", "test_from": "2024-01-08"},
    }, where="benchmark")


def users_for(folder: str, log_bytes: int, num_items: int) -> int:
    """How many users make a log of so many bytes, judged by one block of them."""
    dataset, sample = open_dataset(config_of(folder, 256, num_items)), 0
    for piece in dataset.slices():
        sample += sum(table.nbytes for table in dataset.read(piece))
    return max(256, round(256 * log_bytes / sample))


def main() -> int:
    parser = ArgumentParser(description="Memory and speed of prepare on a log larger than memory.")
    parser.add_argument("--limit-gb", type=float, default=1.5)
    parser.add_argument("--times", type=float, default=1.5)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--folder", default=None, help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    limit = int(options.limit_gb * GB)
    folder = tempfile.mkdtemp(prefix="prepare_memory_", dir=options.folder)
    try:
        num_users = users_for(folder, int(options.times * limit), options.items)
        ray.init(num_cpus=NUM_WORKERS, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20,
                 runtime_env={"worker_process_setup_hook": limit_worker,
                              "env_vars": {LIMIT_VARIABLE: str(limit // NUM_WORKERS)}})
        watch = Watch()
        watch.start()
        started = time.monotonic()
        try:
            result = prepare(config_of(folder, num_users, options.items))
        except (KeyboardInterrupt, MemoryError, ray.exceptions.RayError) as error:
            print(f"bar: workers <= {options.limit_gb:.2f} GB: missed, a task did not get on with its share of the "
                  f"limit ({type(error).__name__})")
            return 1
        seconds = time.monotonic() - started
        watch.ended.set()
        watch.join()
        log = storage.read_json(storage.join(result["shards"], "manifest.json"))["log"]
    finally:
        ray.shutdown()
        shutil.rmtree(folder)
    return report(log, watch, seconds, limit)


def report(log: dict[str, int], watch: Watch, seconds: float, limit: int) -> int:
    """Prints what was measured; the exit status."""
    candidates = 40 * log["rows"]  # four levels of ten, the simulated log's default
    print(f"log: {log['rows']:,} requests, {candidates:,} candidate rows, {log['bytes'] / GB:.2f} GB as Arrow tables, "
          f"{log['bytes'] / limit:.1f} x the limit")
    print(f"time: {seconds:.1f} s, {log['rows'] / seconds:,.0f} requests and {candidates / seconds:,.0f} candidate "
          f"rows a second, simulation included ({NUM_WORKERS} workers, {os.cpu_count()} cores)")
    peaks = ", ".join(f"{peak / GB:.2f}" for peak in sorted(watch.peaks.values(), reverse=True))
    print(f"memory: workers together {watch.sum_of_peaks / GB:.2f} GB at most (peaks of the processes: {peaks} GB), "
          f"driver {status_of('self')['VmHWM'] / GB:.2f} GB")
    met = watch.sum_of_peaks <= limit
    print(f"command: python {' '.join(sys.argv)}; bar: workers <= {limit / GB:.2f} GB: {'met' if met else 'missed'}")
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
