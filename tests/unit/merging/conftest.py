"""Checkpoints that the tests of mergekit files name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mergekit")
    tiny.make_catalogue(path, num_checkpoints=4)
    return path
