"""Settings have the defaults that docs/configuration.md states."""

from pathlib import Path

from settings import assert_documented


def test_defaults_are_those_of_the_page():
    assert_documented("cbgan.config.GanConfig")
    assert_documented("cbgan.evaluate.EvaluateConfig", run=Path("run"))
    assert_documented("cbgan.sample.SampleConfig", run=Path("run"))
    assert_documented("cbgan.bench.BenchConfig")
    assert_documented("cbgan.compare.CompareConfig", runs=[Path("run")])
