"""--submit: the same command line as a Ray job on a cluster, its log on standard output."""

import asyncio
import contextlib
import io
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from raycascade import storage
from raycascade.errors import ConfigError

RUNTIME_ENV = "configs/runtime_env.yaml"  # in a checkout; its paths count from the checkout's root
PACKAGE = "platform/raycascade"


def submit_job(url: str, argv: Sequence[str]) -> int:
    """Runs `raycascade ARGV` (without --submit) on the cluster at a dashboard's URL; 0 if the job succeeded, else 1.

    In a checkout the working tree travels with the job, so a relative config path stays valid. Elsewhere the cluster
    needs raycascade installed and paths that it can read. ConfigError if the URL does not answer or refuses the token.
    """
    client = _client(url)
    from ray.job_submission import JobStatus

    job = client.submit_job(entrypoint=entrypoint(argv), runtime_env=runtime_env(Path.cwd()))
    sys.stderr.write(f"job {job} at {url}\n")
    asyncio.run(_follow(client, job))
    status = client.get_job_status(job)
    if status != JobStatus.SUCCEEDED:
        message = (client.get_job_info(job).message or "no message").partition(", last available logs")[0]
        sys.stderr.write(f"raycascade: job {job} {status.lower()}: {' '.join(message.split())}\n")
    return 0 if status == JobStatus.SUCCEEDED else 1


def entrypoint(argv: Sequence[str]) -> str:
    """The command of the job: without --submit, on the cluster that runs the job."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word in ("--submit", "--address"):
            next(words, None)
        elif not word.startswith(("--submit=", "--address=")):
            kept.append(word)
    return shlex.join(["python", "-m", "raycascade", *kept, "--address", "auto"])


def runtime_env(folder: Path) -> dict[str, Any]:
    """The runtime environment of a checkout with absolute paths; empty elsewhere."""
    path = folder / RUNTIME_ENV
    if not (path.is_file() and (folder / PACKAGE).is_dir()):
        return {}
    described = yaml.safe_load(storage.read_bytes(str(path))) or {}
    if "working_dir" in described:
        described["working_dir"] = str((folder / described["working_dir"]).resolve())
    if "py_modules" in described:
        described["py_modules"] = [str((folder / module).resolve()) for module in described["py_modules"]]
    return described


def _client(url: str) -> Any:
    """A client of the cluster's job server; its own complaints, which span many lines, become one."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)  # it names every file that does not travel
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--submit {url}: expected the URL of a Ray dashboard, such as http://127.0.0.1:8265")
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return JobSubmissionClient(url)
    except ConnectionError:
        raise ConfigError(f"--submit {url}: nothing answers there; give the URL of a running cluster's dashboard, "
                          "such as http://127.0.0.1:8265") from None
    except AuthenticationError:
        raise ConfigError(f"--submit {url}: the token was refused; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as on "
                          "the cluster") from None
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"--submit {url}: not a Ray dashboard ({reason}); give its URL") from None


async def _follow(client: Any, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        sys.stdout.write(lines)
        sys.stdout.flush()
