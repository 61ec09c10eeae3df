"""Requirements of an image, from pyproject.toml: `python wanted.py control|worker`; versions are the lock's."""

import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
stack = project["optional-dependencies"]["stack"]
servers = [line for line in project["dependencies"] if line.startswith(("prefect", "fastapi", "mlflow"))]
print("\n".join({"control": servers + stack, "worker": project["dependencies"] + stack + ["setuptools"]}[sys.argv[1]]))
