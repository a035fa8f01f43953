"""A backend that cannot compute a run's layers is refused in one line, before anything is written."""

import pytest
from norm_cases import needs_compiler
from refusals import refused

pytestmark = needs_compiler
LINES = {
    ("--norm.kind", "scb"): "error: norm.backend: 'compiled' has loops for mixtures (ucb, mn) alone",
    ("--norm.kind", "ucb", "--precision", "bf16"): (
        "error: norm.backend: 'compiled' needs float32 on a CPU, got bfloat16 on cpu"
    ),
}


@pytest.mark.parametrize("flags", LINES, ids=" ".join)
def test_compiled_where_it_has_no_loops(application, tiny, tmp_path, capsys, flags):
    for more in ((), ("--dry_run",)):
        given = *tiny, "--device", "cpu", *flags, "--norm.backend", "compiled", *more
        assert refused(capsys, application.main, *given) == LINES[flags]
    assert not list(tmp_path.iterdir())
