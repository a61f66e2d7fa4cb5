"""The libraries that benchmarks compare with: an environment of their own, and a process of it to talk to.

The environment lies below the user's cache folder and has the same build of torch as the caller. A process of it reads
arrays (.npz) and exchanges lines of JSON; the two sides share no code and no objects.
"""

import json
import os
import subprocess
import sys
import venv
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = {"torch-rechub": "0.9.0", "deepctr-torch": "0.3.0", "fuxictr": "2.3.10"}
BESIDE = ("ray[data]==2.60.0", "requests")  # what two of them import on the way to their models
MODELS = {  # the wheel of fuxictr holds models of long sequences only, of which these two are ours as well
    "torch-rechub": ("deepfm", "wide_deep", "dcn", "dcn_v2", "autoint", "fibinet", "afm", "din"),
    "deepctr-torch": ("deepfm", "wide_deep", "dcn", "dcn_v2", "autoint", "fibinet", "afm", "din"),
    "fuxictr": ("dcn_v2", "din"),
}
WORKER = Path(__file__).parent / "_peer_worker.py"


def cache_folder() -> Path:
    """Where the environment lies."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "raycascade" / "peers"


def requirements() -> list[str]:
    """What is installed; torch is the caller's, build included, so that both sides run the same kernels."""
    pins = [f"{name}=={version}" for name, version in LIBRARIES.items()]
    return [f"torch=={metadata.version('torch')}", *pins, *BESIDE]


def peer_python() -> Path:
    """The Python of the peers' environment, which is made on the first call (minutes). RuntimeError where pip fails."""
    folder = cache_folder()
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join(requirements())
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"installing the peers into {folder}: {', '.join(requirements())}", file=sys.stderr, flush=True)
    if not python.exists():
        venv.create(folder, with_pip=True)
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements()], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the peers cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    stamp.write_text(wanted)
    return python


class PeerProcess:
    """`_peer_worker.py` (or another script that speaks the same way) in the peers' environment.

    Every `ask` writes one line of JSON and reads one; RuntimeError with the script's words where it fails.
    """

    def __init__(self, *, threads: int, script: Path = WORKER, python: Path | None = None) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "PYTHONPATH": "",
               "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen([python or peer_python(), script], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request; `do` names what to do."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the process ended"}
        if "error" in answer:
            asked = {key: value for key, value in request.items() if key in ("do", "library", "model")}
            raise RuntimeError(f"peer {asked}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def __enter__(self) -> "PeerProcess":
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


def models_of(model: str, libraries: Sequence[str]) -> list[str]:
    """Those of the libraries that have a model."""
    return [name for name in libraries if model in MODELS[name]]


def pin(cores: Sequence[int]) -> None:
    """Keeps this process and those it starts to some cores, so that no thread of either side gets more than them."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def table_parser(description: str, *, rounds: int, threads: str) -> ArgumentParser:
    """What the comparisons on the click log of `_ctr_table.py` have in common on the command line."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--libraries", nargs="*", default=list(LIBRARIES), choices=list(LIBRARIES))
    parser.add_argument("--loaders", action="store_true", help="each side with its own reading of the data")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 128])
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--history", type=int, default=50, help="past items of a request, for din")
    parser.add_argument("--threads", type=int, default=1, help=threads)
    parser.add_argument("--rounds", type=int, default=rounds)
    return parser
