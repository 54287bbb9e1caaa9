"""What a ranking of the tiny catalogue needs: signals, signatures, and selectors trained on made-up utilities."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.search.headroom import Context
from simmerge_ray.selector.data.dataset import SelectionDataset, pair_features, with_keep
from simmerge_ray.selector.models.train import train_selector
from simmerge_ray.selector.planning.files import SHORTLIST
from simmerge_ray.signals.compute import compute_signals
from simmerge_ray.signals.propagation.second_order import SecondOrder
from simmerge_ray.signals.signature import SignatureSpec, SignatureStore


def write_artifacts(root: Path, catalogue_path: Path, keep: bool = False) -> Path:
    """`pairs.parquet`, `signatures` and `selector` below `root`, which is returned. keep: the selector may keep a
    parent, all of which are better than every merge."""
    spec = SignatureSpec(batch_size=8, num_positions=20, num_attention_positions=6, num_coordinates=500)
    probes = load_probe_sets(catalogue_path.parent / "probes")
    table = compute_signals(load_catalogue(catalogue_path), probes, spec, store=SignatureStore(root / "signatures"))
    table.write(root / "pairs.parquet")
    generator = np.random.default_rng(0)
    contexts, features = [], []
    for left, right in (("m0", "m1"), ("m0", "m2"), ("m1", "m2")):
        for task in table.tasks:
            for _ in range(2):
                items = {arm: generator.random(20) for arm in ("linear", "ties")}
                parents = (generator.random(20), generator.random(20))
                if keep:
                    parents = (0.8 + 0.2 * parents[0], 0.8 + 0.2 * parents[1])
                contexts.append(Context(left, right, task, items, *parents))
                features.append(pair_features(table, left, right, task))
    utilities = np.array([[c.arms[arm].mean() for arm in ("linear", "ties")] for c in contexts])
    dataset = SelectionDataset(tuple(contexts), ("linear", "ties"), table.columns, np.array(features), utilities)
    dataset = with_keep(dataset) if keep else dataset
    config = TrainConfig(num_members=2, num_epochs=200 if keep else 5)
    train_selector(dataset, config).write(root / "selector")
    restricted = dataset.restricted(SecondOrder(table).columns)
    assert restricted.columns == SecondOrder(table).columns
    train_selector(restricted, config).write(root / "selector" / SHORTLIST)
    return root
