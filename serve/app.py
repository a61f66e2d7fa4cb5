"""Applications for Ray's own commands: `serve run serve.app:app bundle=URI`, or an import_path in a Serve config.

`raycascade serve` does the same without this file, from any folder. The environment variables of docs/serving.md must
be set where Ray starts.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict
from ray.serve import Application

from raycascade.errors import ConfigError
from raycascade.flows.serving import APP, application
from raycascade.serving.keys import require_safe_binding
from raycascade.serving.options import load_options, parse_options


class Arguments(BaseModel):
    """`options`: serving options as a mapping, or the path of a YAML file. `name`: as the application is called in the
    Serve config."""

    model_config = ConfigDict(extra="forbid")
    bundle: str
    options: dict[str, Any] | str = {}
    name: str = APP


def app(arguments: Arguments) -> Application:
    """A bundle as the options say."""
    given = arguments.options
    options = load_options(given) if isinstance(given, str) else parse_options(given, where="args.options")
    if options.host != "127.0.0.1":
        raise ConfigError(f"args.options.host: {options.host}: Ray Serve listens where http_options in its config "
                          "says; leave host and port out")
    require_safe_binding(options.host, options)
    return application(arguments.bundle, options, app=arguments.name)
