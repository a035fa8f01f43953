"""A YAML tag that does not fit the value after it is refused in a line that says what to do."""

import pytest

from common.cli.arguments import parse
from common.errors import UsageError
from common.training.config import RunConfig


@pytest.mark.parametrize("setting", ["epochs", "best.keep"])
def test_a_tag_that_does_not_fit_is_to_be_left_out(setting):
    with pytest.raises(UsageError) as refused:
        parse(RunConfig, [f"--{setting}", "!!bool maybe"])
    line = "config: a YAML tag, such as !!bool, does not fit the value after it; leave the tag out"
    assert str(refused.value) == line


def test_one_in_a_file_is_named_with_the_file_and_the_value(tmp_path):
    (tmp_path / "a.yaml").write_text("resume: !!bool maybe\n")
    with pytest.raises(UsageError) as refused:
        parse(RunConfig, ["--config", str(tmp_path / "a.yaml")])
    line = str(refused.value)
    assert line.startswith(f"config: {tmp_path / 'a.yaml'}: ")
    assert "tag" in line
    assert "'maybe'" in line
    assert "\n" not in line
