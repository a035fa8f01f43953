"""Commands start where their page says."""

import pytest
from commands import assert_starts


@pytest.mark.parametrize(
    ("file", "module"),
    [("cbcls/train.py", "cbcls.train"), ("cbcls/evaluate.py", "cbcls.evaluate"), ("cbcls/predict.py", "cbcls.predict")],
)
def test_a_command_starts_its_module(file, module, monkeypatch):
    assert_starts(file, module, monkeypatch)
