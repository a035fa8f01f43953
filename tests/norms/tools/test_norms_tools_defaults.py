"""Settings have the defaults that docs/configuration.md states."""

import pytest
from settings import assert_documented


@pytest.mark.parametrize(
    "name",
    [
        "common.norms.bench.BenchConfig",
        "common.norms.tools.costs.CostsConfig",
        "common.norms.doctor.DoctorConfig",
        "common.norms.tools.aot.AotConfig",
        "common.norms.tools.counts.CountsConfig",
        "common.norms.tools.timing.overhead.OverheadConfig",
        "common.norms.tools.timing.roofline.RooflineConfig",
    ],
)
def test_defaults_are_those_of_the_page(name):
    assert_documented(name)
