"""Prefect's server with a check of the Host header, which Prefect itself has not.

Without it a web page whose name is pointed at 127.0.0.1 (DNS rebinding) counts as the server's own, and whoever may use
the API can start commands on the worker. Needs Prefect alone: the `control` image holds this file and no other of ours.

    uvicorn --factory flows.prefect_server:create_app --host 127.0.0.1 --port 4200
"""

from __future__ import annotations

import os

from prefect.server.api.server import create_app as create_prefect_app
from starlette.middleware.trustedhost import TrustedHostMiddleware


def create_app() -> TrustedHostMiddleware:
    """Prefect's app, which answers as 127.0.0.1, as localhost and by the names in REPAE_PREFECT_HOSTS ("a,b").

    Around it, not in it: Prefect's own services (automations) call the app inside by a name of their own.
    """
    more = [name.strip() for name in os.environ.get("REPAE_PREFECT_HOSTS", "").split(",") if name.strip()]
    names = ["127.0.0.1", "localhost", *more]
    return TrustedHostMiddleware(create_prefect_app(final=True), allowed_hosts=names, www_redirect=False)
