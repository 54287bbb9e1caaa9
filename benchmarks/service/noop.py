"""Deploys an application that does no work beside the service, on the same Ray Serve: the measure of `load`.

    python -m benchmarks.service.noop ADDRESS ANSWERS [--replicas 1]

ADDRESS is that of the Ray cluster; ANSWERS a JSON file with the two bodies, `decision` and `reward`, that it answers.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.measuring import script_parser

PREFIX = "/noop"


def deploy(decision: str, reward: str, replicas: int) -> None:
    """The same routes as the service's, below `PREFIX`. A request is parsed as JSON and a constant is answered."""
    from fastapi import Body, FastAPI, Response
    from ray import serve

    api = FastAPI()

    @api.post("/v1/decisions")
    async def decide(body: dict[str, Any] = Body()) -> Response:  # noqa: B008
        return Response(decision, 201, media_type="application/json")

    @api.post("/v1/decisions/{decision_id}/reward")
    async def give(decision_id: str, body: dict[str, Any] = Body()) -> Response:  # noqa: B008
        return Response(reward, 201, media_type="application/json")

    @serve.deployment(max_ongoing_requests=256, num_replicas=replicas, ray_actor_options={"num_cpus": 0.1})
    @serve.ingress(api)
    class NoOp:
        pass

    quiet = {"enable_access_log": False}  # as `simmerge serve`
    serve.run(NoOp.bind(), name="noop", route_prefix=PREFIX, logging_config=quiet)  # type: ignore[attr-defined]


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("address")
    parser.add_argument("answers", type=Path)
    parser.add_argument("--replicas", type=int, default=1)
    given = parser.parse_args()
    os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", "1")
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # as the service's Ray, which is a local one
    import ray

    ray.init(given.address, log_to_driver=False, logging_level="warning")
    answers = json.loads(given.answers.read_text())
    deploy(answers["decision"], answers["reward"], given.replicas)
    ray.shutdown()


if __name__ == "__main__":
    main()
