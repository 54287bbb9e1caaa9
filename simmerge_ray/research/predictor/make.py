"""A predictor of several small bases: `python -m simmerge_ray.research.predictor.make OUT [SEED ...]`.

For every seed a base, a few experts and a label store in OUT; then the predictor of all of them in OUT/predictor. What
is there already is kept, so an interrupted run goes on. The demo's zoo is of no seed that is used here: it is what the
predictor is tested on (benchmarks/finding/predictor.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

from simmerge_ray.base.config import PredictorConfig, TrainConfig
from simmerge_ray.base.storage import read_json
from simmerge_ray.checkpoints.catalogue import Catalogue, write_catalogue
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.research.predictor.candidates import measure_zoo
from simmerge_ray.research.study.zoo import ZooPart, zoo_part
from simmerge_ray.research.zoo.training import train_checkpoint
from simmerge_ray.selector.predictor.rows import read_candidates
from simmerge_ray.selector.predictor.train import train_predictor

SEEDS = (21, 22, 23)
EXPERTS_PER_DOMAIN = 2
STEP_SHARE = 0.7  # of the demo's training steps


def make_zoo_of(part: ZooPart, out: Path) -> Path:
    """Train the base and experts that are missing, and write the catalogue; its directory."""
    directory = out / "zoos" / part.name
    base = directory / part.base_id
    if not _is_made(base, part.base.digest()):
        print(f"training {part.base_id}", flush=True)
        train_checkpoint(part.base, None, base)
    for expert in part.experts:
        if not _is_made(directory / expert.name, expert.digest()):
            print(f"training {expert.name}", flush=True)
            train_checkpoint(expert, base, directory / expert.name)
    refs = tuple(CheckpointRef(one.name, directory / one.name, part.base_id) for one in part.experts)
    own_task = {one.name: one.domain for one in part.experts}
    write_catalogue(directory / "catalogue.yaml", Catalogue(refs, own_task, CheckpointRef(part.base_id, base)))
    return directory


def _is_made(directory: Path, digest: str) -> bool:
    try:
        return bool(read_json(directory / "recipe.json")["digest"] == digest)
    except (OSError, ValueError, KeyError):
        return False


def make_predictor() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: python -m simmerge_ray.research.predictor.make OUT [SEED ...]")
    out, seeds = Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]] or SEEDS

    def show(done: int, total: int) -> None:
        if done % 50 == 0 or done == total:
            print(f"measured {done} of {total}", flush=True)

    stores = []
    for seed in seeds:
        part = zoo_part(seed, EXPERTS_PER_DOMAIN, step_share=STEP_SHARE)
        stores.append(out / "labels" / part.name)
        measure_zoo(make_zoo_of(part, out), stores[-1], report=show)
    predictor = train_predictor(read_candidates(stores), TrainConfig(model=PredictorConfig().model))
    predictor.write(out / "predictor")
    print(f"predictor in {out / 'predictor'}: {predictor.provenance['left_out']}")


if __name__ == "__main__":
    make_predictor()
