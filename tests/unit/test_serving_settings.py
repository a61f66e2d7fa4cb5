"""What `raycascade serve` sets for Ray Serve: files and ports that no other server of the machine has."""

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

SCRIPT = """
import json, os
from pathlib import Path
from raycascade.flows._fast import set_environment
set_environment(fast=True)
from ray.serve._private import constants
folder = Path(constants.RAY_SERVE_HAPROXY_SOCKET_PATH).parent
print(json.dumps([str(folder), folder.is_dir(), constants.RAY_SERVE_HAPROXY_STATS_PORT,
                  str(Path(constants.RAY_SERVE_HAPROXY_CONFIG_FILE_LOC).parent), os.environ["RAY_AUTH_MODE"]]))
"""


def set_in_a_new_process(**variables: str) -> tuple[str, bool, int, str, str]:
    free = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True,
                          env={**free, **variables})
    folder, there, port, config_folder, mode = json.loads(done.stdout)
    return folder, there, port, config_folder, mode


def test_two_servers_of_a_machine_share_neither_files_nor_ports():
    with socket.socket() as taken:
        with suppress(OSError):  # by another server, which is as good
            taken.bind(("", 8404))
        first, second = set_in_a_new_process(), set_in_a_new_process()
    for folder, was_there, port, config_folder, mode in (first, second):
        assert (was_there, config_folder, mode) == (True, folder, "token")
        assert port != 8404
        assert not Path(folder).exists()  # gone with its process
    assert first[0] != second[0]


def test_what_the_user_has_set_stays():
    _, _, port, _, mode = set_in_a_new_process(RAY_SERVE_HAPROXY_STATS_PORT="8499", RAY_AUTH_MODE="disabled")
    assert (port, mode) == (8499, "disabled")
