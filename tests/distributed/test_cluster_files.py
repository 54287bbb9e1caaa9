"""Every file that users deploy or copy loads with the code that reads it."""

from __future__ import annotations

from pathlib import Path

import yaml

from simmerge_ray.config import StudyConfig, load_yaml
from simmerge_ray.operators.specs import parse_arms

ROOT = Path(__file__).parents[2]


def test_the_serve_config_fits_ray_s_schema_and_our_builder():
    from ray.serve.schema import ServeDeploySchema

    from simmerge_ray.distributed import serve_app

    content = yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text())
    schema = ServeDeploySchema.model_validate(content)
    (application,) = schema.applications
    module, name = application.import_path.split(":")
    assert module == serve_app.__name__ and callable(getattr(serve_app, name))
    serve_app.AppArgs.model_validate(application.args)
    assert [one.name for one in application.deployments] == [serve_app.MergeService.name]
    assert schema.http_options.host == "127.0.0.1"


def test_the_example_study_is_complete():
    config = load_yaml(ROOT / "jobs" / "study.example.yaml", StudyConfig)
    assert len(parse_arms(config.search.arms)) == 4
    assert config.out == ROOT / "runs" / "dataset"
