"""Serving beside the same cascade in process, and beside a server written by hand: latency, throughput, processor time.

    python benchmarks/serve_speed.py [--out DIR] [--table docs/results/serving.md] [--small]

100,000 items, retrieve 500 (two_tower, exact index), pre-rank 100 (mlp), rank 20 (din, 50 events), drawn weights
(`_serve_world.py`). `raycascade serve` as it comes, with a deadline so long that no answer is degraded, one thread of
torch a process; every answer is compared with the one in process. The arms:

in process: from a user's id to item ids and scores (`Bundle.encode`, `recommend`, `ItemTable.ids_of`), in a loop in
this process; cascade alone: `recommend` of the encoded query. The bars are against the former, which is the same work.
fused, composed: over HTTP, through HAProxy, closed loop of 1 and 16 clients in one process (`_serve_client.py`).
by hand: `_serve_reference.py`, FastAPI, PyTorch and FAISS, in one process (the bar) and in two.
1,000 candidates, one core: all processes of the server on one core, retrieve 1,000, rank them with din.

Arms change turns, round by round; fused and composed are two servers one after the other, each with in process beside
it. Exit status 1: a bar is missed, or an answer is wrong. `--small` looks at the works, not at the bars. Linux only.
"""

import json
import os
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from itertools import cycle, islice
from pathlib import Path

import torch
from _serve_processes import Clients, Server, raycascade, reference
from _serve_report import (
    AGAIN,
    ALONE,
    BY_HAND,
    BY_HAND_2,
    COMPOSED,
    FUSED,
    IN_PROCESS,
    LONG,
    Clocked,
    bars_of,
    plain,
    tables,
    write_report,
)
from _serve_world import FULL, SMALL, InProcess, Size, World, make

MANY = 16
LEAST_SAME = 0.99  # of the lists of the server by hand: its scores are of another order of operations
WARM_UP = 0.3  # of the requests of a round


class WrongAnswer(Exception):
    """A server that is clocked must give the answers of the cascade."""


class Bench:
    """The world, what its answers are, and what was clocked so far."""

    def __init__(self, world: World, folder: Path, options: Namespace) -> None:
        self.world, self.folder, self.options = world, folder, options
        self.cascade, self.long_ranking = InProcess(world.cascade), InProcess(world.long_ranking)
        self.clocked: dict[tuple[str, int], Clocked] = {}
        self._users = cycle(world.users)
        self._expected: dict[tuple[str, int], list[object]] = {}

    def users(self, share: float = 1.0) -> list[int]:
        """So many users of a round as the next requests are about."""
        return list(islice(self._users, max(2, round(share * self.options.requests))))

    def arm(self, name: str, clients: int) -> Clocked:
        return self.clocked.setdefault((name, clients), Clocked.empty(name, clients))

    # ---- one round
    def in_process(self, name: str, users: Sequence[int], *, clocked: bool = True) -> None:
        """The loop without a server; `cascade alone` beside the first one."""
        encoded = [self.cascade.encoded(user) for user in users] if name == IN_PROCESS else []
        works = [(self.arm(name, 0), self.cascade.answer, users)]
        works += [(self.arm(ALONE, 0), self.cascade.rank, encoded)] if encoded else []
        for arm, work, arguments in works:
            latency, busy = [], time.process_time()
            for argument in arguments:
                started = time.perf_counter()
                work(argument)
                latency.append(time.perf_counter() - started)
            if clocked:
                arm.latency += latency
                arm.rates.append(len(latency) / sum(latency))
                arm.processor += time.process_time() - busy

    def over_http(
        self, name: str, server: Server, clients: Clients, *, number: int, users: Sequence[int], clocked: bool = True
    ) -> None:
        """One closed loop; WrongAnswer where an answer is not that of the cascade."""
        path, busy = self.folder / "answers.jsonl", server.processor_s()
        done = clients.ask(port=server.port, clients=number, users=users, path=str(path))
        busy = server.processor_s() - busy
        self.check(name, users, path.read_bytes().splitlines())
        if clocked:
            arm = self.arm(name, number)
            arm.latency += done["latency"]
            arm.rates.append(len(users) / done["seconds"])
            arm.processor += busy
            arm.client += done["processor"]

    def check(self, name: str, users: Sequence[int], bodies: Sequence[bytes]) -> None:
        """Whether a server answered as the cascade does."""
        source, uri = (self.long_ranking, "long") if name == LONG else (self.cascade, "cascade")
        same, answers = 0, [json.loads(body) for body in bodies]
        for user, answer in zip(users, answers, strict=True):
            if (uri, user) not in self._expected:
                self._expected[uri, user] = [item for item, _ in source.answer(user)]
            same += [item["item_id"] for item in answer["items"]] == self._expected[uri, user]
        whole = 1.0 if name not in (BY_HAND, BY_HAND_2) else LEAST_SAME
        if same < whole * len(users) or any(answer.get("degraded") for answer in answers):
            raise WrongAnswer(f"{name}: {len(users) - same} of {len(users)} answers are not those of the cascade")

    # ---- the phases
    def beside_fused(self) -> None:
        """Fused, the servers by hand, and in process, in turns."""
        with (Clients() as clients, raycascade(self.world.cascade, "fused", self.folder / "f") as fused,
              reference(self.world.cascade, self.folder, workers=1) as by_hand,
              reference(self.world.cascade, self.folder, workers=2) as by_two):
            servers = {FUSED: fused, BY_HAND: by_hand, BY_HAND_2: by_two}
            for turn in range(1 + self.options.rounds):  # the first one warms up
                share, clocked = (1.0, True) if turn else (WARM_UP, False)
                self.in_process(IN_PROCESS, self.users(share), clocked=clocked)
                for number, times in ((1, 1), (MANY, 4)):
                    for name, server in servers.items():
                        self.over_http(name, server, clients, number=number, users=self.users(times * share),
                                       clocked=clocked)
                _say(f"fused, round {turn}", clocked, self.clocked)

    def beside_composed(self) -> None:
        """Composed and in process, in turns."""
        with Clients() as clients, raycascade(self.world.cascade, "composed", self.folder / "c") as composed:
            for turn in range(1 + self.options.rounds):
                share, clocked = (1.0, True) if turn else (WARM_UP, False)
                self.in_process(AGAIN, self.users(share), clocked=clocked)
                for number, times in ((1, 1), (MANY, 4)):
                    self.over_http(COMPOSED, composed, clients, number=number, users=self.users(times * share),
                                   clocked=clocked)
                _say(f"composed, round {turn}", clocked, self.clocked)

    def long_lists(self) -> None:
        """Many candidates, with the whole server on one core."""
        core = min(os.sched_getaffinity(0))
        one_core = raycascade(self.world.long_ranking, "fused", self.folder / "l", cores=[core])
        with Clients() as clients, one_core as server:
            for turn in range(1 + self.options.rounds):
                share, clocked = (1.0, True) if turn else (WARM_UP, False)
                self.over_http(LONG, server, clients, number=1, users=self.users(share), clocked=clocked)
                _say(f"1,000 candidates, round {turn}", clocked, self.clocked)


def _say(what: str, clocked: bool, found: dict[tuple[str, int], Clocked]) -> None:
    """Progress, for whoever waits."""
    newest = ", ".join(f"{name} x{number} {arm.rates[-1]:.0f}/s" for (name, number), arm in found.items() if arm.rates)
    sys.stderr.write(f"{what}: {newest if clocked else 'warm'}\n")


def run(folder: Path, size: Size, options: Namespace) -> dict[str, object]:
    """One line with everything that was found."""
    before = os.getloadavg()[0]
    bench = Bench(make(folder, size), folder, options)
    bench.beside_fused()
    bench.beside_composed()
    bench.long_lists()
    rows = [arm.summary() for arm in bench.clocked.values()]
    return {"kind": "serving speed", "command": f"python {' '.join(sys.argv)}", "size": asdict(size),
            "rounds": options.rounds, "requests": options.requests, "cores": len(os.sched_getaffinity(0)),
            "torch": torch.__version__, "ray": metadata.version("ray"), "load": [before, os.getloadavg()[0]],
            "rows": rows, "bars": plain(bars_of(rows))}


def main() -> int:
    parser = ArgumentParser(description="The speed of serving.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=200, help="of a round of one client; many: four times that")
    parser.add_argument("--small", action="store_true", help="a small world and one round: does it run?")
    parser.add_argument("--out", help="a folder: a line is added to its serve_speed.jsonl")
    parser.add_argument("--table", help="write the tables to this Markdown file")
    options = parser.parse_args()
    if options.small:
        options.rounds, options.requests = 1, 20
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the servers end with this process
    with tempfile.TemporaryDirectory(prefix="rc", ignore_cleanup_errors=True) as folder:
        try:
            line = run(Path(folder), SMALL if options.small else FULL, options)
        except WrongAnswer as error:
            sys.stderr.write(f"{error}\n")
            return 1
    sys.stdout.write(tables(line) + "\n")
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        with (Path(options.out) / "serve_speed.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    if options.table:
        write_report(Path(options.table), line)
    return 0 if options.small else int(not all(bar.met for bar in bars_of(line["rows"])))  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
