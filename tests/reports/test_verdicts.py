import math

import numpy as np
import pytest
from scipy import stats

from common.reports.verdicts import Difference, holm, judge, paired_difference

SEEDS = range(5)


def arm(*values: float) -> dict[int, float]:
    return dict(zip(SEEDS, values, strict=False))


def test_a_paired_difference_is_scipys():
    treated, control = (0.81, 0.84, 0.79, 0.88, 0.83), (0.80, 0.81, 0.80, 0.84, 0.80)
    ours, theirs = paired_difference(arm(*treated), arm(*control), "higher"), stats.ttest_rel(treated, control)
    interval = theirs.confidence_interval(0.95)
    assert ours[:4] == pytest.approx((np.mean(treated) - np.mean(control), *interval, theirs.pvalue))
    assert ours.seeds == tuple(SEEDS)
    turned = paired_difference(arm(*treated), arm(*control), "lower")
    assert turned[:4] == pytest.approx((-ours.mean, -ours.high, -ours.low, ours.p))


def test_only_seeds_of_both_arms_are_paired():
    found = paired_difference({0: 1.0, 1: 2.0, 7: 9.0}, {1: 1.0, 0: 0.5, 3: 4.0}, "higher")
    assert found.seeds == (0, 1)
    assert found.mean == 0.75


def test_few_pairs_and_pairs_that_differ_by_the_same():
    none, one = paired_difference({0: 1.0}, {1: 1.0}, "higher"), paired_difference({0: 2.0}, {0: 1.5}, "higher")
    assert math.isnan(none.mean)
    assert (one.mean, one.p) == (0.5, 1.0)
    assert math.isnan(one.low)
    same = paired_difference(arm(2, 3, 4, 5, 6), arm(1, 2, 3, 4, 5), "higher")
    assert same == Difference(1.0, 1.0, 1.0, 0.0, tuple(SEEDS))
    assert paired_difference(arm(2, 3, 4), arm(2, 3, 4), "higher").p == 1.0


def test_a_value_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="seed 1: expected finite values, got nan and 0"):
        paired_difference(arm(1, math.nan), arm(0, 0), "higher")


def test_holm_by_hand_and_in_any_order():
    # The example of Holm's procedure at 0.05: 0.005 * 4, 0.01 * 3, then 0.03 * 2 and the larger of it and 0.04.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


CASES = {
    # claim: differences of five seeds, the paper's effect, verdict
    "clear": ((2.0, 2.2, 1.9, 2.1, 2.3), 2.0, "holds"),
    "clear, no number": ((2.0, 2.2, 1.9, 2.1, 2.3), None, "holds"),
    "small": ((0.40, 0.41, 0.42, 0.39, 0.40), 2.0, "holds, smaller than claimed"),
    "none": ((0.1, -0.1, 0.05, -0.05, 0.02), 2.0, "fails"),
    "harm": ((-2.0, -2.2, -1.9, -2.1, -2.3), None, "fails"),
    "noise": ((3.0, -2.0, 4.0, -1.0, 0.5), 2.0, "undecided"),
    "noise, no number": ((0.1, -0.1, 0.05, -0.05, 0.02), None, "undecided"),
    "four seeds": ((2.0, 2.2, 1.9, 2.1), 2.0, "not tested"),
}


def test_each_verdict():
    zeros = arm(0, 0, 0, 0, 0)
    contrasts = {name: paired_difference(arm(*values), zeros, "higher") for name, (values, *_) in CASES.items()}
    judged = judge(contrasts, {name: effect for name, (_, effect, _) in CASES.items()})
    assert {name: found.verdict for name, found in judged.items()} == {name: want for name, (*_, want) in CASES.items()}
    assert math.isnan(judged["four seeds"].adjusted_p)  # and it makes the others' no larger
    assert judged["clear"].adjusted_p <= 7 * contrasts["clear"].p


def test_an_interval_above_0_does_not_hold_where_holm_says_no():
    contrasts = {"borderline": paired_difference(arm(1.0, 2.0, 0.3, 1.6, 0.4), arm(0, 0, 0, 0, 0), "higher")}
    contrasts |= {f"other {k}": paired_difference(arm(1, -1, 2, -2, 0.1), arm(0, 0, 0, 0, 0), "higher") for k in "abc"}
    assert contrasts["borderline"].low > 0
    assert judge(contrasts, dict.fromkeys(contrasts))["borderline"].verdict == "undecided"
    alone = {"borderline": contrasts["borderline"]}
    assert judge(alone, {"borderline": None})["borderline"].verdict == "holds"


def test_pages_without_an_effect_seldom_hold_and_a_planted_one_is_found():
    """1,000 pages of 13 claims about noise, one of which has an effect of three standard deviations on half of them."""
    draw = np.random.default_rng(7)
    false, found = 0, 0
    for page in range(1000):
        noise = draw.normal(size=(13, 2, 5))
        contrasts = {
            str(claim): paired_difference(arm(*pair[0]), arm(*pair[1]), "higher") for claim, pair in enumerate(noise)
        }
        false += any(judged.verdict == "holds" for judged in judge(contrasts, dict.fromkeys(contrasts)).values())
        if page % 2:
            treated = arm(*(noise[0][0] + 8))
            contrasts["0"] = paired_difference(treated, arm(*noise[0][1]), "higher")
            found += judge(contrasts, dict.fromkeys(contrasts))["0"].verdict == "holds"
    assert false <= 70
    assert found >= 450
