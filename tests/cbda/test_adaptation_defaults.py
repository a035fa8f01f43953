"""Settings have the defaults that docs/configuration.md states."""

from pathlib import Path

from settings import assert_documented


def test_defaults_are_those_of_the_page():
    assert_documented("cbda.config.AdaMatchConfig")
    assert_documented("cbda.adaptation.config.MethodConfig")
    for name in ("ModelConfig", "ImagesConfig", "SourceConfig", "TargetConfig"):
        assert_documented(f"cbda.config.{name}")
    assert_documented("cbda.evaluate.EvaluateConfig", run=Path("run"))
    assert_documented("cbda.predict.PredictConfig", run=Path("run"), images=Path("images"))
