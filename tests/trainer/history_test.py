"""Rows of metrics read back."""

import pytest

from pfjax.trainer import history


def _rows(folder, *lines):
    path = folder / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return history.read(path)


def test_a_step_has_one_row_the_last_that_was_written(tmp_path):
    found = _rows(tmp_path, '{"step": 2}', '{"step": 1, "a": 1}', '{"step": 1, "a": 2}')
    assert found == [{"step": 1, "a": 2}, {"step": 2}]
    assert history.read(tmp_path / "absent.jsonl") == []


def test_null_is_no_value_and_a_number_that_is_not_finite_is_one(tmp_path):
    ((row),) = _rows(tmp_path, '{"step": 1, "a": null, "b": NaN}')
    assert row.keys() == {"step", "b"}


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"a": 1}', "step=None"),
        ('{"step": "7"}', "step='7'"),
        ('{"step": true}', "step=True"),
        ('{"step": 1, "a": "x"}', "a='x'"),
    ],
)
def test_a_row_without_a_step_or_with_other_than_numbers_is_named(tmp_path, line, said):
    with pytest.raises(ValueError, match=rf"metrics\.jsonl: {said} in the row"):
        _rows(tmp_path, line)
