"""Settings have the defaults that docs/configuration.md states."""

from pathlib import Path

from settings import assert_documented


def test_defaults_are_those_of_the_page():
    assert_documented("cbcls.config.ClassifierConfig")
    assert_documented("cbcls.config.ModelConfig")
    assert_documented("cbcls.config.ImagesConfig")
    assert_documented("cbcls.clusters.FindClustersConfig")
    assert_documented("common.data.clusters.ClustersConfig")
    assert_documented("cbcls.figures.FiguresConfig", runs=[Path("run")], out=Path("figure"))
