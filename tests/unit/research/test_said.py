"""What a page says beside what was computed."""

import pytest

from simmerge_ray.research.said import Said, check_page

PAGE = """# A study of 2026

Of {count} merges, the selector gains
**+0.8 [-0.2, +2.1]** points.

| arm | gain |
|---|---|
| selector | 0.651 [0.601, 0.701] |
| fixed | 0.0 |

Made with `linear(weight=0.5)`; [figure](figures/study-2.png); base s1.
"""


def page(count: str = "7,307") -> str:
    return PAGE.replace("{count}", count)


GAINS = Said("the selector gains {} points.", ("+0.8 [-0.2, +2.1]",))


def test_a_page_that_says_what_was_computed_has_no_mismatch_wherever_its_lines_end():
    claims = [GAINS, Said("Of {} merges,", ("7,307",)), Said("| selector | {} |", ("0.651 [0.601, 0.701]",))]
    checked = check_page(page(), claims)
    assert checked.mismatches == () and checked.num_values == 3
    assert checked.unchecked == ((9, "0.0"),)  # nobody computed the last row; code, links and titles say nothing


@pytest.mark.parametrize(
    ("says", "computed", "apart", "told"),
    [
        ("7,307", "7,308", 0, "line 3: the page says 7,307, computed 7,308"),
        ("7,307", "7,308", 1, None),
        ("7,306", "7,308", 1, "line 3: the page says 7,306, computed 7,308"),
        ("0.65", "0.651", 9, "line 3: the page says 0.65, computed 0.651"),  # another number of digits
        ("+1 [-2, +3]", "+1 [-2, +6]", 2, "line 3: the page says +1 [-2, +3], computed +1 [-2, +6]"),
        ("-0.0", "+0.0", 0, None),  # the same number
        ("12 %", "12", 0, "line 3: the page says 12 %, computed 12"),
    ],
)  # fmt: skip
def test_a_number_that_differs_is_named_with_its_line(says, computed, apart, told):
    mismatches = check_page(page(says), [Said("Of {} merges,", (computed,), apart)]).mismatches
    assert [str(one) for one in mismatches] == ([] if told is None else [told])


def test_a_passage_that_is_not_on_the_page_is_a_mismatch_too():
    (one,) = check_page(page(), [Said("| no such row | {} |", ("1",))]).mismatches
    assert str(one) == "'| no such row | {} |': the page says nothing of the kind, computed 1"


@pytest.mark.parametrize("claim", [("gains {}", ("1",)), ("{} points", ("1",)), ("of {} and {} points", ("1",))])
def test_a_passage_without_ends_or_with_another_number_of_values_is_refused(claim):
    with pytest.raises(ValueError, match="do not fit"):
        Said(*claim)
