"""What actors ask for: GPUs that are large enough, memory, and why there is no room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.capacity.placement import (
    GPU_SIZES,
    USABLE,
    engine_needs,
    gpu_offer,
    gpu_request,
    how_many_fit,
    missing_on,
    signal_worker_needs,
)

T4, A10, A100 = (16, 4), (24, 1), (80, 8)  # GB of a GPU, GPUs of a node
PARAMETERS_7B = 7.6e9


def node(size_gb: float, num_gpus: int) -> dict[str, float]:
    return {"CPU": 16.0, "GPU": float(num_gpus), **gpu_offer(size_gb, num_gpus)}


def test_a_larger_gpu_offers_all_that_a_smaller_one_does():
    assert gpu_offer(24, 2) == {"gpu_16gb": 2, "gpu_24gb": 2}
    for small, large in zip(GPU_SIZES, GPU_SIZES[1:], strict=False):
        assert gpu_offer(small, 1).keys() < gpu_offer(large, 1).keys()
    assert gpu_offer(8, 1) == {}


@given(st.floats(1e6, 120e9), st.sampled_from([0.25, 0.5, 1.0]), st.sampled_from(GPU_SIZES))
def test_a_node_is_taken_exactly_when_the_bytes_fit_into_the_share_of_its_gpu(num_bytes, gpus, size):
    fits = num_bytes <= USABLE * gpus * size * 1e9
    try:
        asked = {"GPU": gpus, **gpu_request(num_bytes, gpus, ["gpu_sizes"])}
    except ConfigError:
        assert not fits
        return
    assert (how_many_fit(asked, node(size, 1)) == int(1 / gpus)) == fits
    assert (how_many_fit(asked, node(size, 1)) > 0) == fits


def test_models_go_to_the_pools_that_hold_them():
    pools = {name: node(*pool) for name, pool in (("T4", T4), ("A10", A10), ("A100", A100))}

    def taken(engine_bytes: float, gpus: float = 1.0, ranks: int = 1) -> dict[str, int]:
        needs = engine_needs(engine_bytes, 1.0, gpus, ranks, pools["T4"])
        return {name: how_many_fit(needs, pool) for name, pool in pools.items()}

    assert taken(3e9, gpus=0.25) == {"T4": 16, "A10": 4, "A100": 16}  # 16 cores
    assert taken(2 * PARAMETERS_7B + 2e9) == {"T4": 0, "A10": 1, "A100": 8}
    assert taken(4 * PARAMETERS_7B + 2e9) == {"T4": 0, "A10": 0, "A100": 8}
    assert taken(2 * 111e9 + 2e9, ranks=4) == {"T4": 0, "A10": 0, "A100": 8}  # ranks


def test_clusters_that_do_not_say_how_large_their_gpus_are_are_taken_as_they_are():
    assert gpu_request(60e9, 1.0, ["CPU", "GPU", "accelerator_type:T4"]) == {}
    assert engine_needs(60e9, 2.0, 1.0) == {"CPU": 2.0, "GPU": 1.0}
    assert gpu_request(60e9, 0.0, ["gpu_sizes"]) == {}


def test_what_no_gpu_holds_is_refused_with_what_would_help():
    with pytest.raises(ConfigError, match=r"222\.0 GB do not fit on one GPU: the largest has 141 GB; split the model"):
        gpu_request(222e9, 1.0, ["gpu_sizes"])
    with pytest.raises(ConfigError, match=r"60\.0 GB do not fit in 0\.25 of a GPU"):
        gpu_request(60e9, 0.25, ["gpu_sizes"])


def test_on_cpus_memory_is_asked_for_and_on_gpus_the_gpu_s():
    assert signal_worker_needs(5e9, 0.0) == {"CPU": 1.0, "memory": 5e9}
    assert signal_worker_needs(5e9, 0.5, ["gpu_sizes"]) == {"CPU": 1.0, "GPU": 0.5, "gpu_16gb": 0.5}
    assert engine_needs(8e9, 2.0, 0.0, ranks=2) == {"CPU": 2.0, "memory": 4e9}


def test_a_node_holds_no_more_than_its_scarcest_resource():
    needs = {"CPU": 1.0, "memory": 30e9}
    assert how_many_fit(needs, {"CPU": 16.0, "memory": 100e9}) == 3
    assert how_many_fit(needs, {"CPU": 2.0, "memory": 100e9}) == 2
    assert how_many_fit(needs, {"CPU": 2.0}) == 2  # nothing is known of its memory
    assert how_many_fit({"GPU": 0.1}, {"GPU": 1.0}) == 10
    assert how_many_fit({"GPU": 1.0}, {"CPU": 64.0}) == 0


def test_why_there_is_no_room_is_said_of_the_largest_node():
    nodes = [{"CPU": 0.0, "memory": 60e9}, {"CPU": 8.0, "memory": 30e9}]
    assert missing_on({"CPU": 1.0, "memory": 30e9}, nodes) is None
    assert missing_on({"CPU": 1.0, "memory": 100e9}, nodes) == (
        "it needs 100.0 GB of memory, a node has at most 60.0 GB of memory"
    )
    assert missing_on({"CPU": 16.0, "GPU": 1.0}, nodes) == (
        "it needs 16 CPU, a node has at most 8 CPU; it needs 1 GPU, a node has at most 0 GPU"
    )
    both = missing_on({"CPU": 1.0, "memory": 50e9}, nodes)  # no single node has both
    assert both is not None and "1 CPU" in both and "50.0 GB" in both
