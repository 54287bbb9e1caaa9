"""Configs are closed and frozen, and their errors name every problem at once."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from simmerge_ray.base.config import DatasetConfig, SearchConfig, TrainConfig, check_config, load_yaml, parse_ways
from simmerge_ray.base.errors import ConfigError

STUDY = "catalogue: zoo/catalogue.yaml\nprobes: zoo/probes\ntasks: zoo/tasks\nout: out\n"


def test_paths_of_a_study_are_relative_to_its_file(tmp_path):
    (tmp_path / "study.yaml").write_text(STUDY + "search: {arms: [linear], evaluator: transformers}\n")
    config = load_yaml(tmp_path / "study.yaml", DatasetConfig)
    assert config.catalogue == tmp_path / "zoo" / "catalogue.yaml"
    assert config.search.arms == ("linear",)


def test_all_problems_are_in_one_message_with_the_nearest_key(tmp_path):
    (tmp_path / "s.yaml").write_text("catalog: x\nprobes: p\ntasks: t\nout: o\nsearch: {concurency: 2, dtype: int8}\n")
    with pytest.raises(ConfigError) as caught:
        load_yaml(tmp_path / "s.yaml", DatasetConfig)
    message = str(caught.value)
    assert "unknown key 'catalog' (did you mean 'catalogue'?)" in message
    assert "key 'catalogue' is missing" in message
    assert "unknown key 'search.concurency' (did you mean 'concurrency'?)" in message
    assert "'search.dtype'" in message and "int8" in message


@pytest.mark.parametrize("text", ["", "- a", "{", "3"])
def test_what_is_no_mapping_is_refused(tmp_path, text):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_yaml(tmp_path / "s.yaml", DatasetConfig)
    with pytest.raises(ConfigError, match="No such file"):
        load_yaml(tmp_path / "absent.yaml", DatasetConfig)


def test_a_config_cannot_be_changed():
    config = TrainConfig()
    with pytest.raises(ValidationError):
        config.seed = 3


def test_values_out_of_range_are_named():
    with pytest.raises(ConfigError, match=r"'concurrency'.*greater than or equal to 1.*got 0"):
        check_config(SearchConfig, {"concurrency": 0}, "options")


def test_ways_and_pairs_are_text_or_lists():
    assert (parse_ways("3"), parse_ways("2-4")) == ((3, 3), (2, 4))
    as_text = check_config(SearchConfig, {"ways": "2-4", "exclude": ["a,b"]}, "options")
    assert as_text == check_config(SearchConfig, {"ways": [2, 4], "exclude": [["a", "b"]]}, "options")
    with pytest.raises(ConfigError, match="'ways': ways is a number of checkpoints or a range, 3 or 2-4, got 'x'"):
        check_config(SearchConfig, {"ways": "x"}, "options")
    with pytest.raises(ConfigError, match="'exclude.0': a pair is LEFT,RIGHT, got 'a'"):
        check_config(SearchConfig, {"exclude": ["a"]}, "options")
