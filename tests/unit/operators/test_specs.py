"""Arms as text: canonical labels, and one clear error for anything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmerge_ray.errors import OperatorError
from simmerge_ray.operators.specs import OPERATOR_SPECS, check_weight, make_arm, parse_arm, parse_arms


@given(st.sampled_from(sorted(OPERATOR_SPECS)), st.data())
def test_label_and_arm_are_inverse(operator, data):
    specs = OPERATOR_SPECS[operator].parameters
    params = {
        name: data.draw(st.sampled_from([spec.default, 0.25, 0.75]))
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
        ("tise", r"unknown operator 'tise' \(did you mean 'ties'\?\); known: linear"),
        ("ties(dens=0.2)", r"unknown parameter 'dens' .*known: density, scale"),
        ("ties(density=0)", r"'density': 0.0 is outside \(0, 1\]"),
        ("ties(density=nan)", "not a finite number"),
        ("ties(density)", "not of the form name=number"),
        ("ties density", "not of the form operator"),
        ("linear(weight=0.5)", "unknown parameter 'weight'"),
    ],
)
def test_bad_arms_name_value_rule_and_choices(text, message):
    with pytest.raises(OperatorError, match=message):
        parse_arm(text)


def test_no_arms_or_the_same_twice_are_refused():
    with pytest.raises(OperatorError, match="no arms"):
        parse_arms([])
    with pytest.raises(OperatorError, match="'ties' is given twice"):
        parse_arms(["ties", "linear", "ties(density=0.5)"])


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan"), True])
def test_a_weight_outside_zero_and_one_is_refused(weight):
    with pytest.raises(OperatorError, match="weight"):
        check_weight(weight)
