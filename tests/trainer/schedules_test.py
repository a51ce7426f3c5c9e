import pytest

from pfjax.trainer import schedules


def test_values_are_linear_between_points_and_constant_outside():
    found = schedules.parse("alpha:1@1, 3@5, 2@9, beta:0@2")
    alpha = [schedules.value(found, "alpha", s, 7.0) for s in (0, 1, 2, 5, 7, 9, 99)]
    assert alpha == [1.0, 1.0, 1.5, 3.0, 2.5, 2.0, 2.0]
    assert schedules.value(found, "beta", 5, 7.0) == 0.0


def test_without_a_schedule_the_default_holds():
    assert schedules.parse("") == {}
    assert schedules.value({}, "alpha", 3, 7.0) == 7


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("alhpa:1@1", r"'alhpa' .*did you mean alpha\? \(alpha, beta"),
        ("seed:1@1", r"'seed' is no setting that has a schedule \("),
        ("1@1,alpha:2@5", "'1@1' comes before any setting; write NAME:VALUE@STEP"),
        ("alpha:4", "'4' is no VALUE@STEP; write"),
        ("alpha:1@1.5", "'1@1.5' is no VALUE@STEP"),
        ("alpha:1@1,0@9", "alpha must be positive, got 0@9"),
        ("beta:-1@1", "beta must be at least 0, got -1@1"),
        ("alpha:inf@1", "alpha must be finite, got inf@1"),
        ("alpha:nan@1", "alpha must be finite, got nan@1"),
        ("alpha:1@-3", "steps must not be negative, got 1@-3"),
        ("alpha:1@5,2@5", r"steps of alpha must increase, got \[5, 5\]"),
        ("alpha:1@5,2@3", r"steps of alpha must increase, got \[5, 3\]"),
        ("alpha:1@1,alpha:2@5", "alpha is given twice"),
    ],
)
def test_what_is_no_schedule_is_refused_in_one_line(text, said):
    with pytest.raises(ValueError, match=said) as error:
        schedules.parse(text)
    assert str(error.value).startswith(f"--config.schedules={text}: ")
    assert "\n" not in str(error.value)
