"""The cases of `cases`: what is made has the numbers of the reference, what is warned about or refused says why."""

from __future__ import annotations

import numpy as np
import pytest

from simmerge_ray.base.errors import InputError
from simmerge_ray.merging.engine.compute import Computer
from simmerge_ray.merging.engine.sources import open_sources
from simmerge_ray.merging.request import read_request
from tests.peer.cases import CASES
from tests.peer.families import FAMILIES

# One rounding of the output; float32 sums of a few terms besides.
ROUNDING = {"F32": 2e-6, "BF16": 2**-8, "F16": 2**-11}


def test_names_are_unique_and_every_outcome_is_there():
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.expect for case in CASES} == {"made", "warned", "refused"}
    assert all(case.says for case in CASES if case.expect != "made")
    assert all(case.why for case in CASES if case.peer == "other")
    assert {case.family for case in CASES} <= FAMILIES.keys()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_is_what_is_expected_of_it(family_path, family_tensors, tmp_path, case):
    path = family_path(case.family)
    file = path / "case.yaml"
    file.write_text(case.text)
    if case.expect == "refused":
        with pytest.raises(InputError) as error:
            read_request(file, tmp_path / "out")
        assert case.says in str(error.value)
        return
    request = read_request(file, tmp_path / "out")
    graph = request.graph
    assert any(case.says in line for line in request.warnings()) if case.expect == "warned" else not graph.warnings
    if case.expect == "warned":
        with pytest.raises(InputError, match="--strict"):
            read_request(file, tmp_path / "out", strict=True)
    if case.truth is None:
        return
    assert graph.mergekit is not None
    (tmp_path / "copy.yaml").write_text(graph.mergekit)
    copy = read_request(tmp_path / "copy.yaml", tmp_path / "out").graph
    assert [(o.name, o.shape, o.dtype) for o in copy.outputs] == [(o.name, o.shape, o.dtype) for o in graph.outputs]
    assert (copy.config, copy.mergekit) == (graph.config, graph.mergekit)
    assert not any("ignored" in line for line in copy.warnings)
    tensors = family_tensors(case.family)
    with open_sources(graph) as sources:
        computer = Computer(graph, sources)
        for output in graph.outputs:
            array, _ = computer.array(output)
            found = (array.astype(np.uint32) << 16).view(np.float32) if output.dtype == "BF16" else array
            tensors.name = output.name
            expected = case.truth(output.name, tensors).ravel()
            limit = ROUNDING.get(output.dtype, 0.0)
            np.testing.assert_allclose(found, expected, rtol=limit, atol=limit, err_msg=output.name)
