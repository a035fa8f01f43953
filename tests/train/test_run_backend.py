"""A backend that cannot compute a run's layers is refused in one line, before anything is written."""

import pytest
from applications import APPLICATIONS
from norm_cases import needs_compiler
from refusals import refused

COMPILED = {
    ("--norm.kind", "scb"): "error: norm.backend: 'compiled' has loops for mixtures (ucb, mn) alone",
    ("--norm.kind", "ucb", "--precision", "bf16"): (
        "error: norm.backend: 'compiled' needs float32 on a CPU, got bfloat16 on cpu"
    ),
}


@needs_compiler
def test_compiled_where_it_has_no_loops(application, tiny, tmp_path, capsys):
    for flags, line in COMPILED.items():
        given = *tiny, "--device", "cpu", *flags, "--norm.backend", "compiled"
        assert refused(capsys, application.main, *given) == line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("application", APPLICATIONS, indirect=True)
def test_triton_without_a_gpu(application, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    before = set(tmp_path.rglob("*"))
    for more in ((), ("--dry_run",)):
        given = *tiny, "--device", "cpu", "--norm.backend", "triton", *more
        assert "error: norm.backend: 'triton' needs a CUDA tensor" in refused(capsys, application.main, *given)
    assert set(tmp_path.rglob("*")) == before
