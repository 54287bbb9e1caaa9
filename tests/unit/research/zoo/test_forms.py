"""The other surface forms: the same questions, other prompts and answers, within the model's alphabet and rows."""

from itertools import islice

import pytest

from simmerge_ray.base.errors import InputError
from simmerge_ray.research.zoo.domains import DOMAINS, Example, Split, example_stream
from simmerge_ray.research.zoo.forms import FOREIGN, foreign_form, training_stream
from simmerge_ray.research.zoo.model import ALPHABET
from simmerge_ray.research.zoo.training import ROW_TOKENS


@pytest.mark.parametrize(
    ("domain", "shown", "foreign"),
    [
        ("math", Example("3+4+5=", "12"), Example("3 4 5:", "12;")),
        ("code", Example("s='dog'\nprint(s[-1])\n", "g"), Example("dog.last:", 'g"')),
        ("code", Example("x='abc'\nprint(max(x))\n", "c"), Example("abc.highest:", 'c"')),
        ("multilingual", Example("de Chad,Peru>", "Tschad,Peru"), Example("Chad/Peru to german:", "Tschad/Peru")),
        ("rag", Example("tom=rug ann=tea ann?", "tea"), Example("tom:rug ann:tea ann:", "tea)")),
    ],
)
def test_each_domain_has_another_form(domain, shown, foreign):
    assert foreign_form(domain, shown) == foreign


@pytest.mark.parametrize("domain", DOMAINS)
def test_streams_of_both_forms_are_the_same_questions_and_no_answer_is_right_in_the_other_form(domain):
    shown = list(islice(training_stream(domain, 3), 300))
    foreign = list(islice(training_stream(FOREIGN + domain, 3), 300))
    assert shown == list(islice(example_stream(domain, Split.TRAINING, 3), 300))
    for one, other in zip(shown, foreign, strict=True):
        assert one.prompt != other.prompt and one.target.strip() != other.target.strip()
        assert set("".join(other)) <= set(ALPHABET)
        assert len("".join(other)) + 2 <= ROW_TOKENS  # with <bos> and <eos>


def test_an_unknown_name_is_an_error():
    with pytest.raises(InputError, match="'sums'"):
        next(training_stream(f"{FOREIGN}sums", 0))
