"""Settings have the defaults that docs/configuration.md states."""

from settings import assert_documented


def test_defaults_are_those_of_the_page():
    assert_documented("cbcls.config.ClassifierConfig")
    assert_documented("cbcls.config.ModelConfig")
    assert_documented("cbcls.config.ImagesConfig")
    assert_documented("common.data.clusters.ClustersConfig")
