"""Tasks on a cluster: a process that dies is tried again a few times, and then somebody is told."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from raycascade.errors import DataError, ResourceError
from raycascade.flows._cluster import MOST_ATTEMPTS, each

pytestmark = pytest.mark.ray


def test_a_task_that_dies_every_time_ends_the_job_with_one_line(ray_cluster: None, tmp_path: Path):
    def dies(element: int) -> int:
        if element == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return element

    with pytest.raises(ResourceError, match=f"task 1 died {MOST_ATTEMPTS} times.*memory"):
        each(dies, [0, 1], notes=str(tmp_path))


def test_a_task_that_dies_once_is_done_by_another_process(ray_cluster: None, tmp_path: Path):
    died = tmp_path / "died"

    def dies_once(element: int) -> int:
        if element == 1 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 10 * element

    assert each(dies_once, [0, 1, 2], notes=str(tmp_path / "notes")) == [0, 10, 20]
    assert died.exists()


def test_a_users_error_in_a_task_comes_back_as_itself(ray_cluster: None, tmp_path: Path):
    def refuses(element: Any) -> Any:
        raise DataError(f"element {element}: a column is missing")

    with pytest.raises(DataError, match="element 7: a column is missing"):
        each(refuses, [7], notes=str(tmp_path))
