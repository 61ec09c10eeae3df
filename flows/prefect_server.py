"""Prefect's server with a check of the Host header, which Prefect itself has not.

Without it a web page whose name is pointed at 127.0.0.1 (DNS rebinding) counts as the server's own, and whoever may use
the API can start commands on the worker. Needs Prefect alone: the `control` image holds this file and no other of ours.

    uvicorn --factory flows.prefect_server:create_app --host 127.0.0.1 --port 4200
"""

from __future__ import annotations

import os

from fastapi import FastAPI
from prefect.server.api.server import create_app as create_prefect_app
from starlette.middleware.trustedhost import TrustedHostMiddleware


def create_app() -> FastAPI:
    """Prefect's app, which answers as 127.0.0.1, as localhost and by the names in REPAE_PREFECT_HOSTS ("a,b")."""
    more = [name.strip() for name in os.environ.get("REPAE_PREFECT_HOSTS", "").split(",") if name.strip()]
    app = create_prefect_app(final=True)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", *more], www_redirect=False)
    return app
