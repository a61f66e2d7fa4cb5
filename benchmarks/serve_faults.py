"""Faults and swaps under load, on a Ray Serve that `raycascade serve` starts here. Exit status 1: a bar was missed.

    python benchmarks/serve_faults.py                              a few minutes
    python benchmarks/serve_faults.py --kills 20 --swaps 20 --out runs.jsonl --table docs/results/serving.md

Needs redis-server. Requests come at a fixed rate, whether answers do or not, up to a bound of those on their way; half
of what the machine bears at most. Five in a hundred are events that were sent before, and four users keep sending new
ones until each is taken.

kills: `kill -9` of a replica of a stage, of a gateway, or of Redis (started again after two seconds), in an order drawn
with a seed; the next one when everything is back. Bars: no wrong answer: a whole answer has the items that the version
it names gives in this process with the history that Redis holds (or none, where it says so), a degraded one those of
the stage before the one that it names; every event counted once. No failed request, but for events while Redis is away,
and with a single gateway everything from its end until it answers again.

swaps: `raycascade deploy` of two bundles in turn, and in between of a damaged one and of one whose self-check lies.
Bars: no failed, no mixed and no degraded answer; requests that begin after the command has ended get the new version;
bad bundles are refused with status 2.
"""

import argparse
import asyncio
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the world stands beside the tests

from _fault_report import Outcome, finish
from _serve_deployment import Deployment, Redis, redis_server
from _serve_load import (
    READERS,
    Failure,
    Load,
    Right,
    bearable,
    events_before,
    posted,
    ready,
    right_answers,
    written_wrong,
)

from raycascade import storage
from raycascade.bundle import add_to_manifest
from tests.served import checked_bundle
from tests.tiny_world import KEEPS

USERS_MS = 500  # everything shares a few cores
BACK_S = 240.0  # the most that a replica may take to be back
REDIS_AWAY_S, FOUND_AGAIN_S = 2.0, 3.0  # a gateway looks every half second whether Redis is back


@dataclass(frozen=True)
class SetUp:
    """What is served, and the deployments whose replicas are killed, with how many each has."""

    name: str
    mode: str
    gateways: int

    @property
    def replicas(self) -> dict[str, int]:
        """By deployment."""
        stages = {} if self.mode == "fused" else {name: 2 if name == "pre_ranker" else 1 for name in KEEPS}
        return {**stages, "Gateway": self.gateways}

    def server(self, folder: Path, bundle: str, redis: Redis, deadline_ms: int) -> Deployment:
        """It, starting."""
        stages = [f"stages.{name}.replicas={count}" for name, count in self.replicas.items() if name != "Gateway"]
        return Deployment(folder, bundle, mode=self.mode, options=[
            f"gateway.replicas={self.gateways}", "users.store=redis", f"users.url={redis.url}",
            f"users.timeout_ms={USERS_MS}", f"deadline_ms={deadline_ms}", f"release={folder / 'release'}", *stages])


SET_UPS = (SetUp("composed, one gateway", "composed", 1), SetUp("composed, two gateways", "composed", 2),
           SetUp("fused, two gateways", "fused", 2))


@dataclass(frozen=True)
class Kill:
    """What was killed, when, and when everything was as before."""

    target: str
    at_s: float
    back_s: float


# ---------------------------------------------------------------- kills
async def kill(target: str, set_up: SetUp, server: Deployment, redis: Redis, load: Load, draw: random.Random) -> Kill:
    """Kills one and waits until everything is back; TimeoutError."""
    doors, began = await server.doors(), time.monotonic()
    if target == "redis":
        redis.kill()
        await asyncio.sleep(REDIS_AWAY_S)
        redis.start()
    else:
        os.kill(draw.choice(server.replicas(target)), signal.SIGKILL)
    load.tally.whole_in_a_row = 0
    async with asyncio.timeout(BACK_S):
        while not await _whole(set_up, server, load) or (target == "Gateway" and await server.doors() == doors):
            await asyncio.sleep(0.25)
    return Kill(target, began, time.monotonic())


async def _whole(set_up: SetUp, server: Deployment, load: Load) -> bool:
    counts = {name: len(server.replicas(name)) for name in set_up.replicas}
    return (counts == set_up.replicas and len(await server.doors()) == set_up.gateways
            and load.tally.whole_in_a_row >= 20 and await ready(server.url))


def excused(failure: Failure, kills: list[Kill], load: Load, *, gateways: int) -> bool:
    """Whether a request could not be answered: an event without Redis, or anything without a gateway."""
    for one in kills:
        if one.target == "redis" and failure.kind == "events" and failure.status == 503:
            until = one.at_s + REDIS_AWAY_S + FOUND_AGAIN_S
        elif one.target == "Gateway" and gateways == 1:
            until = min((ended for began, ended in load.tally.good if began > one.at_s), default=one.back_s)
        else:
            continue
        if failure.ended_s >= one.at_s and failure.began_s <= until:
            return True
    return False


async def killed(
    set_up: SetUp, server: Deployment, redis: Redis, uri: str, right: Right, options: argparse.Namespace
) -> Outcome:
    """So many kills under load."""
    draw = random.Random(options.seed)
    targets = [*(name for name in set_up.replicas), "redis"]
    order = (targets * options.kills)[:options.kills]
    draw.shuffle(order)
    rate, kills = await bearable(server.url, options.rate), []
    async with Load(server.url, [right], rate=rate, seed=options.seed) as load:
        await load.more(50)
        for target in order:
            kills.append(await kill(target, set_up, server, redis, load, draw))
            sys.stderr.write(f"  {target}: back after {kills[-1].back_s - kills[-1].at_s:.1f} s, "
                             f"{len(load.tally.failures)} failures, {len(load.tally.wrong)} wrong\n")
            await load.more(50)
    tally = load.tally
    failed = [one for one in tally.failures if not excused(one, kills, load, gateways=set_up.gateways)]
    wrong = [*tally.wrong, *await written_wrong(server.url, uri, load.written)]
    back = {target: [round(one.back_s - one.at_s, 1) for one in kills if one.target == target] for target in targets}
    return Outcome("faults", set_up.name, rate, tally, failed, wrong, done=dict(Counter(order)), seconds=back,
                   excused=len(tally.failures) - len(failed))


# ---------------------------------------------------------------- swaps
def bad_bundles(good: str, folder: Path) -> dict[str, str]:
    """Copies of a bundle: one with a byte too many, one that does not answer as its self-check says."""
    damaged = shutil.copytree(good, folder / "damaged")
    with open(damaged / "stages" / "ranker" / "weights.safetensors", "ab") as file:
        file.write(b"x")
    lying = str(shutil.copytree(good, folder / "lying"))
    file = storage.join(lying, "selfcheck/answers.json")
    answers = storage.read_json(file)
    answers["stages"][-1]["scores"][0][0] += 0.5
    storage.write_json(file, answers)
    add_to_manifest(lying, ["selfcheck/answers.json"])
    return {"damaged": str(damaged), "lying": lying}


async def swapped(
    set_up: SetUp, server: Deployment, uris: list[str], bad: dict[str, str], rights: list[Right],
    options: argparse.Namespace,
) -> Outcome:
    """So many swaps under load, bad bundles in between."""
    rate, wrong, done, seconds = await bearable(server.url, options.rate), [], Counter(), {"swap": [], "refusal": []}
    attempts = [(f"swap {number}", uris[(number + 1) % 2]) for number in range(options.swaps)]
    for position, (name, uri) in enumerate(bad.items()):
        attempts.insert((position + 1) * len(attempts) // 3, (name, uri))
    async with Load(server.url, rights, rate=rate, seed=options.seed) as load:
        load.needs = rights[0].version
        await load.more(50)
        for name, uri in attempts:
            swap, began, before = name not in bad, time.monotonic(), load.needs
            load.needs = None if swap else before
            status, output = await server.deploy(uri)
            seconds["swap" if swap else "refusal"].append(round(time.monotonic() - began, 1))
            done["swap" if swap else name] += 1
            if status != (0 if swap else 2):
                wrong.append(f"deploy of {name}: status {status}: {output[-300:]}")
            load.needs = rights[uris.index(uri)].version if swap and status == 0 else before
            sys.stderr.write(f"  {name}: {seconds['swap' if swap else 'refusal'][-1]} s, status {status}, "
                             f"{len(load.tally.failures)} failures, {len(load.tally.wrong)} wrong\n")
            await load.more(50)
    wrong += [*load.tally.wrong, *(f"degraded: {what}" for what in load.tally.degraded.elements())]
    return Outcome("swaps", set_up.name, rate, load.tally, load.tally.failures, wrong, done=dict(done),
                   seconds=seconds, excused=0)


# ---------------------------------------------------------------- the run
async def run(folder: Path, options: argparse.Namespace) -> list[Outcome]:
    """Every set-up in turn, each with a server and a Redis of its own."""
    uris = [checked_bundle(str(folder / name), seed=seed) for name, seed in (("one", 11), ("two", 12))]
    bad = bad_bundles(uris[0], folder)
    rights = [await right_answers(uri, events_before(), READERS) for uri in uris]
    outcomes = []
    for number, set_up in enumerate(SET_UPS):
        swaps = options.swaps if set_up.gateways > 1 else 0
        if options.only not in set_up.name or not (options.kills or swaps):
            continue
        sys.stderr.write(f"{set_up.name}\n")
        with (redis_server(folder / f"redis{number}") as redis,
              set_up.server(folder / f"serve{number}", uris[0], redis, options.deadline_ms) as server):
            await posted(server.url, "/v1/events", {"events": events_before()})
            if options.kills:
                outcomes.append(await killed(set_up, server, redis, uris[0], rights[0], options))
            if swaps:
                outcomes.append(await swapped(set_up, server, uris, bad, rights, options))
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description="Faults and swaps under load.")
    parser.add_argument("--kills", type=int, default=4, help="in each set-up")
    parser.add_argument("--swaps", type=int, default=3, help="in each set-up with two gateways")
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second, where the machine bears them")
    parser.add_argument("--deadline-ms", type=int, default=5_000, help="of a request")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="set-ups whose name has this in it")
    parser.add_argument("--out", default="", help="a file of JSON lines to add to")
    parser.add_argument("--table", default="", help="a page whose tables of faults and swaps are written anew")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rc") as folder:
        outcomes = asyncio.run(run(Path(folder), options))
    return finish([outcome.line() for outcome in outcomes], out=options.out, table=options.table)


if __name__ == "__main__":
    sys.exit(main())
