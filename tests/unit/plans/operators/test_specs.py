"""Arms as text: canonical labels, and one clear error for anything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmerge_ray.base.errors import OperatorError
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS, check_weight, make_arm, parse_arm, parse_arms

VALUES = {
    "float": lambda spec: [spec.high, spec.high / 4, 0.1234567 * spec.high, spec.high / 3],
    "int": lambda spec: [spec.low, 7, 123],
    "bool": lambda spec: [True, False],
    "choice": lambda spec: list(spec.choices),
}


@given(st.sampled_from(sorted(OPERATOR_SPECS)), st.data())
def test_label_and_arm_are_inverse(operator, data):
    specs = OPERATOR_SPECS[operator].parameters
    params = {
        name: data.draw(st.sampled_from([spec.default, *VALUES[spec.kind](spec)]))
        for name, spec in specs.items()
        if data.draw(st.booleans())
    }
    arm = make_arm(operator, params)
    assert parse_arm(arm.label) == arm
    assert arm.param_dict() == {name: params.get(name, spec.default) for name, spec in specs.items()}


def test_defaults_are_left_out_so_that_one_arm_has_one_label():
    assert make_arm("ties", {"density": 0.5, "scale": 1.0}).label == "ties"
    assert parse_arm(" ties( scale=2, density=0.2 ) ").label == "ties(density=0.2, scale=2)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tise", r"unknown operator 'tise' \(did you mean 'ties'\?\); known: arcee_fusion, breadcrumbs, .*linear"),
        ("ties(dens=0.2)", r"unknown parameter 'dens' .*known: density, normalize, rescale, scale, trim_scope"),
        ("ties(trim_scope=model)", "'trim_scope': 'model' is not one of tensor, global"),
        ("ties(trim_scope=1)", "'trim_scope': '1' is not one of tensor, global"),
        ("ties(density=global)", "not of the form name=number"),
        ("ties(density=0)", r"'density': 0.0 is outside \(0, 1\]"),
        ("ties(density=nan)", "not a finite number"),
        ("ties(density)", "not of the form name=number"),
        ("ties density", "not of the form operator"),
        ("linear(weight=0.5)", "unknown parameter 'weight'"),
        ("linear(normalize=1)", "'normalize': 1.0 is not true or false"),
        ("linear(normalize=yes)", "name=true or name=false"),
        ("ties(density=true)", "True is not a finite number"),
        ("karcher(max_iter=2.5)", "'max_iter': 2.5 is not a whole number"),
        ("karcher(max_iter=0)", r"'max_iter': 0.0 is outside \[1, 1000\]"),
        ("karcher(max_iter=inf)", "not a finite number"),
    ],
)
def test_bad_arms_name_value_rule_and_choices(text, message):
    with pytest.raises(OperatorError, match=message):
        parse_arm(text)


def test_switches_and_counts_have_their_own_types_and_text():
    arm = parse_arm("nuslerp(row_wise=true, flatten=false)")
    assert arm.params == (("flatten", False), ("row_wise", True))
    assert arm.label == "nuslerp(flatten=false, row_wise=true)"
    count = parse_arm("karcher(max_iter=20)").param_dict()["max_iter"]
    assert count == 20 and isinstance(count, int)
    assert parse_arm("karcher(max_iter=10)").label == "karcher"


def test_a_choice_is_a_word_and_its_default_is_left_out():
    arm = parse_arm("ties(trim_scope = global, density=0.2)")
    assert arm.label == "ties(density=0.2, trim_scope=global)"
    assert make_arm("ties", {"trim_scope": "tensor"}) == make_arm("ties") and make_arm("ties").params == ()
    with pytest.raises(OperatorError, match="True is not one of tensor, global"):
        make_arm("ties", {"trim_scope": True})


def test_arms_that_differ_a_little_have_different_labels():
    labels = {parse_arm(f"ties(density={density})").label for density in ("0.1234567", "0.1234568", "0.1")}
    assert labels == {"ties(density=0.1234567)", "ties(density=0.1234568)", "ties(density=0.1)"}


def test_the_table_states_what_operators_need():
    for name, spec in OPERATOR_SPECS.items():
        assert spec.uses_base or not spec.needs_base
        assert spec.max_sources is None or spec.min_sources <= spec.max_sources
        assert spec.per_source <= spec.parameters.keys()
        for key, parameter in spec.parameters.items():
            assert parameter.problem(parameter.default) is None, (name, key)


def test_no_arms_or_the_same_twice_are_refused():
    with pytest.raises(OperatorError, match="no arms"):
        parse_arms([])
    with pytest.raises(OperatorError, match="'ties' is given twice"):
        parse_arms(["ties", "linear", "ties(density=0.5)"])


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan"), True])
def test_a_weight_outside_zero_and_one_is_refused(weight):
    with pytest.raises(OperatorError, match="weight"):
        check_weight(weight)
