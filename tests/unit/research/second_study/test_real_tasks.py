from __future__ import annotations

from itertools import islice

import pytest

from simmerge_ray.base.errors import InputError
from simmerge_ray.research.second_study.real_tasks import GENERAL, REAL_TASKS, RealData
from simmerge_ray.research.zoo.domains import Example
from tests.unit.research.second_study.made_up import write_real_tasks


@pytest.fixture
def data(tmp_path):
    return RealData(write_real_tasks(tmp_path / "tasks"))


def test_held_out_examples_are_never_trained_on(data):
    for task in REAL_TASKS:
        held_out, trained = data.held_out(task), data.training(task)
        assert len(held_out) == 6 and not set(held_out) & set(trained) and len(held_out) + len(trained) == 12
        streamed = list(islice(data.stream(task, 0), 60))
        assert set(streamed) == set(trained)
        assert set(streamed[:6]) == set(trained)  # each once before any comes again


def test_the_order_of_the_lines_decides_nothing(data, tmp_path):
    turned = RealData(write_real_tasks(tmp_path / "turned", turned=True))
    assert turned.digest() == data.digest()
    for task in REAL_TASKS:
        assert turned.held_out(task) == data.held_out(task) and turned.items(task) == data.items(task)
        assert turned.probes(task, 3) == data.probes(task, 3)
        assert list(islice(turned.stream(task, 1), 9)) == list(islice(data.stream(task, 1), 9))


def test_streams_follow_from_their_seed_and_other_data_have_another_digest(data, tmp_path):
    first, second = (list(islice(data.stream("math", seed), 6)) for seed in (1, 2))
    assert first != second and set(first) == set(second)
    other = RealData(write_real_tasks(tmp_path / "other", num=14))
    assert other.digest() != data.digest()


def test_general_text_is_the_passages_of_training_questions(data):
    path = data.path("qa", "train")
    passage = "One two three four five."
    line = '{"prompt": "Context: %s\\nQuestion: who?\\nAnswer:", "target": " two"}\n'
    path.write_text("".join(line % f"{passage} {number}." for number in range(4)))
    texts = list(islice(data.stream(GENERAL, 0), 10))
    assert set(texts) == {Example("One two three", f" four five. {one.target.split()[-1]}") for one in texts}
    assert {"".join(one) for one in texts} <= {f"{passage} {number}." for number in range(4)} and len(set(texts)) == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [("", "no lines"), ('{"prompt": "a"}\n', r"line 1: .*'target'"), ('{"prompt": 3, "target": "b"}\n', "'prompt'")],
)
def test_other_files_are_refused(data, lines, message):
    data.path("bash", "train").write_text(lines)
    with pytest.raises(InputError, match=message):
        data.training("bash")


def test_questions_without_passages_give_no_general_text(data):
    data.path("qa", "train").write_text('{"prompt": "a b", "target": "c"}\n' * 4)
    with pytest.raises(InputError, match="no passage"):
        next(data.stream(GENERAL, 0))
