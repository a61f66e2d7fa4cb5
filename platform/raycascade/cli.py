"""`raycascade <verb>`: argv -> config -> flow, and the result as a table or as one JSON object.

Exit status 0 = done, 1 = failed, 2 = wrong usage or input, with one line on standard error.
"""

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from raycascade import cli_keys
from raycascade.errors import ComparisonError, ConfigError, RaycascadeError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Train, evaluate, score and serve recommendation cascades as one system on Ray.")

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML config")]
BundleUri = Annotated[
    str, typer.Argument(metavar="BUNDLE", help="the URI that `train` printed, or a config: its newest bundle")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value ...]", help="overrides such as train.epochs=2")
]
ServeOverrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value ...]", help="serving options such as stages.ranker.replicas=2")
]
Json = Annotated[bool, typer.Option("--json", help="print the result as one JSON object on the last line")]
Address = Annotated[str | None, typer.Option("--address", help="a Ray cluster; default: a local Ray")]
Submit = Annotated[
    str | None, typer.Option("--submit", metavar="URL", help="send this command to a cluster as a Ray job")
]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
INTERRUPTED = 130  # what typer returns for Ctrl-C


def main() -> None:
    """The console script: runs a verb and turns errors into one line and an exit status."""
    status = run(sys.argv[1:])
    sys.stdout.flush()
    sys.stdout = sys.stderr  # so that nothing Ray may still say comes behind the result
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit status."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    warnings.filterwarnings("ignore")
    debug = "--debug" in arguments
    try:
        if app(args=arguments, standalone_mode=False) == INTERRUPTED:
            return _complain("interrupted", 1, None)
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


Sheets = Callable[[dict[str, Any]], list[tuple[str, list[str], list[list[str]]]]]


def _finish(result: dict[str, Any], *, as_json: bool, sheets: Sheets | None = None) -> None:
    """Prints the result: one JSON line, or tables for a person (`sheets` makes them, else keys and values)."""
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for title, columns, lines in sheets(result) if sheets else []:
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            table.add_column(column, no_wrap=True)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    if sheets:
        result = {key: value for key, value in result.items() if isinstance(value, str)}
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


def _verb(
    work: Callable[[], dict[str, Any]], *, as_json: bool, address: str | None, submit: str | None,
    sheets: Sheets | None = None,
) -> None:
    """Runs a verb here on Ray, or sends the same command line to a cluster."""
    if submit:
        from raycascade.flows.submit import submit_job

        raise typer.Exit(_exit(submit_job(submit, sys.argv[1:])))
    from raycascade.flows._cluster import connect

    connect(address)
    with contextlib.redirect_stdout(sys.stderr):  # Ray tells of workers that die on standard output
        result = work()
    _finish(result, as_json=as_json, sheets=sheets)


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


@app.command("semantic-ids")
def semantic_ids(config: ConfigPath, overrides: Overrides = None, as_json: Json = False, address: Address = None,
                 submit: Submit = None, debug: Debug = False) -> None:
    """Learn semantic ids from the content vectors of prepared items, and report on them."""
    del debug
    from raycascade.config import load_config
    from raycascade.flows import semantic_ids as flow

    loaded = flow.require_declared(load_config(config, overrides or ()))
    _verb(lambda: flow.semantic_ids(loaded), as_json=as_json, address=address, submit=submit)


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
def compare(
    config: ConfigPath, overrides: Overrides = None,
    losses: Annotated[str, typer.Option("--losses", help="losses, or labels of compare.objectives: a,b")] = "",
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="default: compare.seeds")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="test on each day, then train on it")] = False,
    out: Annotated[str | None, typer.Option("--out", help="folder; default: _compare below paths.bundles")] = None,
    as_json: Json = False, address: Address = None, submit: Submit = None, debug: Debug = False,
) -> None:
    """Compare objectives over seeds: mean, deviation, paired t-test, table and plot. Finished runs are kept."""
    del debug
    from raycascade.comparison import chosen
    from raycascade.comparison_page import brief_sheets
    from raycascade.config import load_config
    from raycascade.flows import compare as flow

    named = [name.strip() for name in losses.split(",") if name.strip()]
    loaded = chosen(load_config(config, overrides or ()), losses=named, seeds=seeds)
    failed: list[str] = []

    def work() -> dict[str, Any]:
        result = flow.compare(loaded, streaming=streaming, out=out)
        failed.extend(f"{run}: {problem}" for run, problem in result["failed"].items())
        return result

    _verb(work, as_json=as_json, address=address, submit=submit, sheets=brief_sheets)
    if failed:
        raise ComparisonError(f"compare: {len(failed)} runs failed ({failed[0]}); the figures are those of the others; "
                              "the same command tries the failed ones again")


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
    bundle: BundleUri, overrides: ServeOverrides = None,
    options: Annotated[str | None, typer.Option("--options", help="a YAML file of serving options")] = None,
    mode: Annotated[
        str | None, typer.Option("--mode", help="composed: a deployment per stage; fused: all in one replica")
    ] = None,
    host: str | None = None, port: int | None = None, address: Address = None, debug: Debug = False,
) -> None:
    """Serve a bundle over HTTP until interrupted."""
    del debug
    from raycascade.flows._fast import set_environment
    from raycascade.serving.options import load_options

    given = {"mode": mode, "host": host, "port": port}
    named = [f"{key}={value}" for key, value in given.items() if value is not None]
    loaded = load_options(options, [*(overrides or ()), *named])
    uri = _bundle(bundle)
    set_environment(fast=loaded.fast and address is None)
    from raycascade.flows import serving
    from raycascade.flows._cluster import connect

    connect(address)
    serving.serve_until_interrupted(uri, loaded)


@app.command()
def deploy(
    bundle: BundleUri,
    app_name: Annotated[str, typer.Option("--app", help="the application that serves")] = "raycascade",
    as_json: Json = False, address: Annotated[str, typer.Option("--address", help="the Ray cluster of it")] = "auto",
    submit: Submit = None, debug: Debug = False,
) -> None:
    """Serve another bundle in the place of the one that is served: checked first, then in all replicas or in none."""
    del debug
    from raycascade.flows._fast import set_environment

    uri = _bundle(bundle)
    set_environment(fast=False)

    def work() -> dict[str, Any]:
        from raycascade.flows import deploy as flow

        return flow.deploy(uri, app=app_name)

    _verb(work, as_json=as_json, address=address, submit=submit)


app.add_typer(cli_keys.app, name="keys")
users = typer.Typer(no_args_is_help=True, help="Users of a served bundle.")
app.add_typer(users, name="users")


@users.command("load")
def users_load(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="a Parquet file or folder with a user_id column")],
    to: Annotated[str, typer.Option("--to", help="URL of Redis, or env:NAME of a variable that holds it")],
    bundle: Annotated[str, typer.Option("--bundle", help="a bundle whose features the users have, or a config")],
    namespace: Annotated[str, typer.Option("--namespace", help="users.namespace of the options")] = "raycascade",
    history_len: Annotated[int, typer.Option("--history-len", min=1, max=10_000, help="newest events kept")] = 200,
    errors: Annotated[str, typer.Option("--errors", help="a line for each bad row")] = "users-load.errors.txt",
    as_json: Json = False, debug: Debug = False,
) -> None:
    """Fill the user store in Redis with features and histories. An interrupted load goes on with the same command."""
    del debug
    from raycascade.flows import users as flow

    uri = _bundle(bundle)
    _finish(flow.load(source, to=to, bundle=uri, namespace=namespace, history_len=history_len, errors=errors),
            as_json=as_json)


@app.command()
def demo(
    folder: Annotated[str, typer.Option("--folder", help="where to write")] = "outputs/demo",
    as_json: Json = False, address: Address = None, debug: Debug = False,
) -> None:
    """Everything above on simulated data, then one request over HTTP."""
    del debug
    from raycascade.flows import demo as flow

    _verb(lambda: flow.demo(folder), as_json=as_json, address=address, submit=None)
