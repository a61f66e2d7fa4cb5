"""`raycascade <verb>`: argv -> config -> flow, and the result as a table or as one JSON object.

Exit status 0 = done, 1 = failed, 2 = wrong usage or input, with one line on standard error.
"""

import json
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from raycascade.errors import ConfigError, RaycascadeError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Train, evaluate, score and serve recommendation cascades as one system on Ray.")

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML config")]
BundleUri = Annotated[
    str, typer.Argument(metavar="BUNDLE", help="the URI that `train` printed, or a config: its newest bundle")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value ...]", help="overrides such as train.epochs=2")
]
Json = Annotated[bool, typer.Option("--json", help="print the result as one JSON object on the last line")]
Address = Annotated[str | None, typer.Option("--address", help="a Ray cluster; default: a local Ray")]
Submit = Annotated[
    str | None, typer.Option("--submit", metavar="URL", help="send this command to a cluster as a Ray job")
]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


def main() -> None:
    """The console script: runs a verb and turns errors into one line and an exit status."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit status."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    warnings.filterwarnings("ignore")
    debug = "--debug" in arguments
    try:
        app(args=arguments, standalone_mode=False)
    except RaycascadeError as error:
        return _complain(str(error), error.exit_status, error if debug else None)
    except (typer.Abort, KeyboardInterrupt):
        return _complain("interrupted", 1, None)
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is not None and getattr(error, "exit_code", None) == 2:  # wrong usage, as typer sees it
            return _complain(usage(), 2, error if debug else None) if str(error) else 2
        if debug:
            raise
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        problem = f"{type(error).__name__}: {lines[-1].strip()}"
        return _complain(f"{problem} (run again with --debug for the traceback)", 1, None)
    return 0


def _complain(message: str, status: int, error: Exception | None) -> int:
    if error is not None:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    sys.stderr.write(f"raycascade: {' '.join(message.split())}\n")
    return status


def _finish(result: dict[str, Any], *, as_json: bool) -> None:
    """Prints the result: one JSON line, or a table for a person."""
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for title, rows in _sections(result):
        table = Table(title=title or None, title_justify="left", show_header=False)
        for key, value in rows:
            table.add_row(key, f"{value:.4f}" if isinstance(value, float) else str(value))
        console.print(table)


def _sections(result: dict[str, Any]) -> list[tuple[str, list[tuple[str, Any]]]]:
    plain = [(key, value) for key, value in result.items() if not isinstance(value, dict)]
    sections = [("", plain)] if plain else []
    for key, value in result.items():
        if isinstance(value, dict):
            nested = [(f"{key} / {title}".rstrip(" /"), rows) for title, rows in _sections(value)]
            sections += nested
    return sections


def _verb(work: Callable[[], dict[str, Any]], *, as_json: bool, address: str | None, submit: str | None) -> None:
    """Runs a verb here on Ray, or sends the same command line to a cluster."""
    if submit:
        from raycascade.flows.submit import submit_job

        raise typer.Exit(_exit(submit_job(submit, sys.argv[1:])))
    from raycascade.flows._cluster import connect

    connect(address)
    _finish(work(), as_json=as_json)


def _bundle(target: str, overrides: "list[str] | tuple[str, ...]" = ()) -> str:
    """A bundle's URI as it is; for the path of a config, the newest bundle that was trained from it."""
    from raycascade.bundle import latest, require_finished
    from raycascade.config import load_config

    if target.endswith((".yaml", ".yml")):
        return latest(load_config(target, overrides))
    if overrides:
        raise ConfigError(f"override {overrides[0]!r}: a bundle's config is fixed; give a config in its place")
    if not any(word.startswith("--submit") for word in sys.argv):  # the cluster may see what this machine does not
        require_finished(target)  # before Ray is started for nothing
    return target


def _exit(status: int) -> int:
    if status:
        sys.exit(status)
    return status


@app.command()
def prepare(config: ConfigPath, overrides: Overrides = None, as_json: Json = False, address: Address = None,
            submit: Submit = None, debug: Debug = False) -> None:
    """Build feature shards from the raw log."""
    del debug
    from raycascade.config import load_config
    from raycascade.flows import prepare as flow

    loaded = load_config(config, overrides or ())
    _verb(lambda: flow.prepare(loaded), as_json=as_json, address=address, submit=submit)


@app.command()
def train(config: ConfigPath, overrides: Overrides = None, as_json: Json = False, address: Address = None,
          submit: Submit = None, debug: Debug = False) -> None:
    """Train the cascade and write a bundle."""
    del debug
    from raycascade.config import load_config
    from raycascade.flows import train as flow

    loaded = load_config(config, overrides or ())
    _verb(lambda: flow.train(loaded), as_json=as_json, address=address, submit=submit)


@app.command()
def evaluate(
    bundle: BundleUri, overrides: Overrides = None, split: str = "test", as_json: Json = False,
    address: Address = None, submit: Submit = None, debug: Debug = False,
) -> None:
    """Measure every stage and the whole cascade beside popularity and random; write report.html."""
    del debug
    from raycascade.flows import evaluate as flow

    uri = _bundle(bundle, overrides or ())
    _verb(lambda: flow.evaluate(uri, split=split), as_json=as_json, address=address, submit=submit)


@app.command()
def index(bundle: BundleUri, as_json: Json = False, address: Address = None, submit: Submit = None,
          debug: Debug = False) -> None:
    """Rebuild the item vectors and the index of a bundle into a new one."""
    del debug
    from raycascade.flows import index as flow

    uri = _bundle(bundle)
    _verb(lambda: flow.index(uri), as_json=as_json, address=address, submit=submit)


@app.command()
def score(
    bundle: BundleUri,
    requests: Annotated[str, typer.Option("--requests", help="Parquet file or folder with a user_id column")],
    out: Annotated[str, typer.Option("--out", help="folder for the results")],
    as_json: Json = False, address: Address = None, submit: Submit = None, debug: Debug = False,
) -> None:
    """Recommend for every request of a Parquet table: one result row each."""
    del debug
    from raycascade.flows import score as flow

    uri = _bundle(bundle)
    _verb(lambda: flow.score(uri, requests=requests, out=out), as_json=as_json, address=address, submit=submit)


@app.command()
def explain(
    bundle: BundleUri,
    user: Annotated[str, typer.Option("--user", help="user id as in the log")],
    item: Annotated[str, typer.Option("--item", help="item id as in the log")],
    as_json: Json = False, debug: Debug = False,
) -> None:
    """Say at which stage an item is lost for a user, its rank and score everywhere, and the cut it missed."""
    del debug
    from raycascade.explain import explain as explain_item

    _finish(explain_item(_bundle(bundle), user=user, item=item), as_json=as_json)


@app.command()
def serve(
    bundle: BundleUri,
    mode: Annotated[
        str, typer.Option("--mode", help="composed: a deployment per stage; fused: all in one replica")
    ] = "composed",
    host: str = "127.0.0.1", port: int = 8000, address: Address = None, debug: Debug = False,
) -> None:
    """Serve a bundle over HTTP until interrupted."""
    del debug
    from raycascade.flows import serving
    from raycascade.flows._cluster import connect

    connect(address)
    serving.serve_until_interrupted(_bundle(bundle), mode=mode, host=host, port=port)


@app.command()
def demo(
    folder: Annotated[str, typer.Option("--folder", help="where to write")] = "outputs/demo",
    as_json: Json = False, address: Address = None, debug: Debug = False,
) -> None:
    """Everything above on simulated data, then one request over HTTP."""
    del debug
    from raycascade.flows import demo as flow

    _verb(lambda: flow.demo(folder), as_json=as_json, address=address, submit=None)
