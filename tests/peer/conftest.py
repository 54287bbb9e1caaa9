"""Checkpoints of the cases, shared by all tests of this directory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.peer.checkpoints import CheckpointTensors, make_family


@pytest.fixture(scope="package")
def family_path(tmp_path_factory) -> Callable[[str], Path]:
    """The directory of a family's checkpoints."""
    root = tmp_path_factory.mktemp("families")
    return lambda family: make_family(root, family)


@pytest.fixture(scope="package")
def family_tensors(family_path) -> Callable[[str], CheckpointTensors]:
    """The tensors of a family's checkpoints."""
    return cache(lambda family: CheckpointTensors(family_path(family)))
