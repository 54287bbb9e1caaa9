"""The domains: what is trained on, probed and evaluated never meets, and every example fits the model."""

from itertools import islice

import pytest

from simmerge_ray.base.errors import InputError
from simmerge_ray.research.zoo.domains import (
    DOMAINS,
    MAX_PROMPT_CHARS,
    MAX_TARGET_CHARS,
    Example,
    Split,
    evaluation_items,
    example_stream,
    probe_texts,
    split_of,
)
from simmerge_ray.research.zoo.model import build_tokenizer


def training_examples(domain: str, num: int, seed: int) -> list[Example]:
    return list(islice(example_stream(domain, Split.TRAINING, seed), num))


@pytest.fixture(params=sorted(DOMAINS))
def domain(request: pytest.FixtureRequest) -> str:
    return request.param


def test_splits_share_no_prompt_whatever_the_seeds(domain: str) -> None:
    trained = {example.prompt for seed in (0, 1) for example in training_examples(domain, 3000, seed)}
    evaluated = {item.prompt for seed in (0, 2) for item in evaluation_items(domain, 400, seed)}
    probed = {prompt for seed in (0, 3) for prompt in probe_texts(domain, 100, seed)}
    assert not trained & evaluated
    assert not trained & probed
    assert not probed & evaluated


def test_each_key_belongs_to_the_one_split_that_its_digest_says(domain: str) -> None:
    assert sorted(residue for split in Split for residue in split.value) == list(range(20))
    assert split_of(domain, "a key") is split_of(domain, "a key")


def test_evaluation_items_and_probes_are_distinct_and_as_many_as_asked(domain: str) -> None:
    items, probes = evaluation_items(domain, 400), probe_texts(domain, 64)
    assert len({item.prompt for item in items}) == len(items) == 400
    assert len(set(probes)) == len(probes) == 64


def test_same_seed_gives_the_same_examples_and_another_seed_others(domain: str) -> None:
    assert training_examples(domain, 50, 7) == training_examples(domain, 50, 7)
    assert training_examples(domain, 50, 7) != training_examples(domain, 50, 8)
    assert evaluation_items(domain, 20) == evaluation_items(domain, 40)[:20]


def test_examples_fit_and_round_trip_through_the_tokenizer(domain: str) -> None:
    tokenizer = build_tokenizer()
    for example in training_examples(domain, 300, 0) + evaluation_items(domain, 100):
        assert 0 < len(example.prompt) <= MAX_PROMPT_CHARS
        assert 0 < len(example.target) <= MAX_TARGET_CHARS
        for text in example:
            ids = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in ids
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_question_that_is_only_rephrased_stays_in_its_split() -> None:
    evaluated = {tuple(sorted(item.prompt[3:-1].split(","))) for item in evaluation_items("multilingual", 300)}
    swapped = {",".join(reversed(item.prompt[3:-1].split(","))) for item in evaluation_items("multilingual", 300)}
    trained = [example.prompt for example in training_examples("multilingual", 4000, 0)]
    in_evaluation = {item.prompt[:3] + pair + ">" for item in evaluation_items("multilingual", 300) for pair in swapped}
    held_out = {
        f"{item.prompt[:3]}{','.join(reversed(item.prompt[3:-1].split(',')))}>"
        for item in evaluation_items("multilingual", 300)
    }
    assert evaluated and in_evaluation
    assert not held_out & set(trained)


def test_multilingual_facts_are_all_seen_in_training() -> None:
    def facts(examples: list[Example]) -> set[tuple[str, str]]:
        return {(e.prompt[:2], name) for e in examples for name in e.prompt[3:-1].split(",")}

    missing = facts(evaluation_items("multilingual", 400)) - facts(training_examples("multilingual", 8000, 0))
    assert not missing


def test_math_targets_are_the_sums() -> None:
    assert all(eval(item.prompt[:-1]) == int(item.target) for item in evaluation_items("math", 100))


def test_code_targets_are_what_the_programs_print(capsys: pytest.CaptureFixture[str]) -> None:
    for item in evaluation_items("code", 100):
        exec(item.prompt, {})
        assert capsys.readouterr().out == item.target + "\n"


def test_rag_targets_are_the_values_in_the_passages() -> None:
    for item in evaluation_items("rag", 100):
        *passages, question = item.prompt.split(" ")
        assert dict(passage.split("=") for passage in passages)[question[:-1]] == item.target


def test_more_items_than_exist_is_an_error_that_says_how_many_do() -> None:
    with pytest.raises(InputError, match=r"'math' has no 100000 different probe items \(found \d+\)"):
        probe_texts("math", 100_000)


def test_unknown_domain_names_the_choices() -> None:
    with pytest.raises(InputError, match="unknown domain 'maths'.*math"):
        next(example_stream("maths", Split.TRAINING, 0))
