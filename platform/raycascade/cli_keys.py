"""`raycascade keys add|list|remove`: the file of API keys, from the command line."""

import json
import sys
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="API keys of a served cascade: add, list, remove.")

File = Annotated[str, typer.Option("--file", help="the JSON file that the serving options name as keys.file")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="who has the key, as logs and limits call it")]
Json = Annotated[bool, typer.Option("--json", help="print the result as one JSON object on the last line")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
COLUMNS = ("name", "per_second", "burst", "created")


@app.command()
def add(
    name: Name, file: File,
    per_second: Annotated[
        float | None, typer.Option("--per-second", help="requests per second; default: limits.per_second")
    ] = None,
    burst: Annotated[int | None, typer.Option("--burst", help="at once; default: a second's worth")] = None,
    as_json: Json = False, debug: Debug = False,
) -> None:
    """Make a key and print it, once: the file holds a hash. Servers take it up within a second."""
    del debug
    from raycascade.serving import keys

    key = keys.add_key(file, name, per_second=per_second, burst=burst)
    sys.stdout.write((json.dumps({"name": name, "key": key, "file": file}) if as_json else key) + "\n")
    sys.stderr.write(f"key {name!r} is in {file}; it cannot be shown again\n")


@app.command("list")
def list_all(file: File, as_json: Json = False, debug: Debug = False) -> None:
    """Name every key, its rate and when it was made."""
    del debug
    from raycascade.serving import keys

    found = [key.model_dump(include=set(COLUMNS)) for key in keys.read_keys(file)]
    if as_json:
        sys.stdout.write(json.dumps({"keys": found}) + "\n")
        return
    for row in [dict(zip(COLUMNS, COLUMNS, strict=True)), *found]:
        cells = ["default" if row[column] is None else str(row[column]) for column in COLUMNS]
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(cells, (24, 10, 8, 0), strict=True)) + "\n")


@app.command()
def remove(name: Name, file: File, debug: Debug = False) -> None:
    """Take a key away. Servers refuse it within a second."""
    del debug
    from raycascade.serving import keys

    keys.remove_key(file, name)
    sys.stderr.write(f"key {name!r} is gone from {file}\n")
