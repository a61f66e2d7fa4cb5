"""Applications for Ray's own commands: `serve run serve.app:composed bundle=URI`, or an import_path in a Serve config.

`raycascade serve` does the same without this file, from any folder.
"""

from pydantic import BaseModel
from ray.serve import Application

from raycascade.flows.serving import application


class Arguments(BaseModel):
    bundle: str


def composed(arguments: Arguments) -> Application:
    """Every stage a deployment of its own."""
    return application(arguments.bundle, mode="composed")


def fused(arguments: Arguments) -> Application:
    """All stages in one replica."""
    return application(arguments.bundle, mode="fused")
