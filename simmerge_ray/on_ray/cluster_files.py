"""Cluster files as Ray reads them, and as our own rules do: launcher YAML, KubeRay manifests, Serve configs."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from simmerge_ray.base.config import ServiceConfig
from simmerge_ray.base.errors import first_line
from simmerge_ray.base.yaml_text import parse_yaml
from simmerge_ray.capacity.cluster_files.check import lint
from simmerge_ray.capacity.cluster_files.reading import LAUNCHER, SERVE, read_documents


def check_cluster_file(path: Path) -> list[str]:
    """Problems of a file, each with place and rule; ConfigError if it cannot be read or holds nothing known here."""
    documents = read_documents(path)
    return [
        f"document {number}: {problem}" if len(documents) > 1 else problem
        for number, content in enumerate(documents, 1)
        for problem in _check(content)
    ]


def _check(content: Mapping[str, Any]) -> list[str]:
    if content.keys() >= set(LAUNCHER):
        return _by_launcher(content) or lint(content)
    if content.keys() >= set(SERVE):
        return _by_serve(content) + lint(content)
    problems = lint(content)
    served = content.get("spec", {}).get("serveConfigV2") if content["kind"] == "RayService" else None
    if isinstance(served, str):
        inner = parse_yaml(served)
        problems += [f"spec.serveConfigV2: {problem}" for problem in _by_serve(inner) + lint(inner)]
    return problems


def _by_launcher(content: Mapping[str, Any]) -> list[str]:
    """Ray's schema, then its own validation of the file as it completes it."""
    import jsonschema
    import ray
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    problems = [
        f"{'.'.join(map(str, error.absolute_path)) or 'file'}: {error.message.splitlines()[0]}"
        for error in jsonschema.Draft7Validator(schema).iter_errors(content)
    ]
    logging.getLogger("ray.autoscaler._private.util").setLevel(logging.ERROR)
    try:
        if not problems:
            validate_config(prepare_config(copy.deepcopy(dict(content))))
    except Exception as error:  # whatever Ray raises is what `ray up` would stop with
        problems.append(first_line(error))
    return problems


def _by_serve(content: Any) -> list[str]:
    """Ray's schema, and the arguments of our own application."""
    from ray.serve.schema import ServeDeploySchema

    from simmerge_ray.on_ray.serve_app import build

    try:
        schema = ServeDeploySchema.model_validate(content)
    except ValidationError as error:
        return _problems_of(error, "")
    problems = []
    for application in schema.applications:
        if application.import_path == f"{build.__module__}:{build.__name__}":
            try:
                ServiceConfig.model_validate(application.args)
            except ValidationError as error:
                problems += _problems_of(error, f"applications.{application.name}.args.")
    return problems


def _problems_of(error: ValidationError, where: str) -> list[str]:
    return [f"{where}{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
