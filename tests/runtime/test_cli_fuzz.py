"""Whatever stands in a file or on the command line: a configuration, or one line that says what is wrong."""

import contextlib
import functools
import io
import os
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cbgan.config import GanConfig
from common.runtime import cli
from common.runtime.cli import flatten, parse, to_dict
from common.runtime.command import run_command

FIELDS = [name for name, _ in flatten(to_dict(GanConfig()))]

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "100")),
    derandomize=True,  # the same examples every time: a red run can be repeated
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def check(*argv: str) -> None:
    """Parse a command line, and assert that it is taken without a word or refused in one line with status 2."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as left:
        run_command(lambda: parse(GanConfig, argv))
    lines = said.getvalue().splitlines()
    if left.value.code:
        assert left.value.code == 2
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert lines[0].isprintable()
    else:
        assert not lines


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """Return a file to write to, in a folder of its own that is the working folder too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_parser", functools.cache(cli._parser))  # most of a parse's time
    return tmp_path / "c.yaml"


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**4), 10**4),
    st.integers(-3, 70),
    st.integers(min_value=10**14),  # more than any memory holds; sizes between are refused or allocated by luck
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["ucb", "bn", "digits", "auto", "1e3", "null", "true", "~", "", " ", "\n", "{", "a: 1"]),
    st.dates(),
    st.binary(max_size=4),
)
names = st.sampled_from([*FIELDS, "norm", "data", "config", "help", "__path__", "norm.kind.x"]) | st.text(max_size=5)
leaves = st.sampled_from(sorted({name.split(".")[-1] for name in FIELDS})) | names | st.integers() | st.none()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(leaves, inner, max_size=4), max_leaves=8
)
documents = st.dictionaries(names | leaves, values, max_size=5)
text = st.text(alphabet=st.sampled_from(string.printable + "é\u2028\ufeff\x85"), max_size=40)
syntax = st.lists(
    st.sampled_from(
        ["epochs", "norm", "kind", ": ", ":", "\n", "\n  ", "- ", "{", "}", "[", "]", ",", "&a ", "*a", "<<", "!!",
         "!!python/name:os.system", "!!binary ", "!!set ", "!!timestamp ", "!!int ", "!!bool ", "!!float ", "|", ">",
         "'", '"', "#", "---\n", "...\n", "%YAML 1.1", "?", "null", "1", "0x1f", "1:30", ".nan", "yes", "=", "\t", "@"]
    ), max_size=12,
).map("".join)  # fmt: skip


@fuzz
@given(content=st.binary(max_size=60) | (text | syntax).map(str.encode))
@example(content=b"\xef\xbb\xbfepochs: 3\n")
@example(content=b"\x00")
@example(content=b"!!timestamp ")
@example(content=b"epochs: !!int ''")
@example(content=b"resume: !!bool x")
def test_arbitrary_bytes_and_text_in_a_file(file, content):
    file.write_bytes(content)
    check("--config", str(file))


@fuzz
@given(document=documents, fields=st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, scalars)))
@example(document={"config": "c.yaml"}, fields={})
@example(document={"epochs": {}}, fields={})
@example(document={"norm": {"kind": {"a": 1}}}, fields={})
def test_real_names_with_values_of_any_type(file, document, fields):
    for name, value in fields.items():
        group, _, leaf = name.rpartition(".")
        place = document.setdefault(group, {}) if group else document
        if isinstance(place, dict):
            place[leaf] = value
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    check("--config", str(file))


words = scalars.map(str) | st.text(max_size=10) | syntax
options = names.map(lambda name: f"--{name}") | st.sampled_from(["-h", "--", "-", "--norm.kind+", "--no_resume", "-1"])


@fuzz
@given(argv=st.lists(options | words | st.tuples(options, words).map("=".join), max_size=5))
@example(argv=["--print_config=x"])
@example(argv=["--config", "{a: 1}"])
@example(argv=["--config", ""])
@example(argv=["--help"])
@example(argv=["--resume=0\x1e0"])
@example(argv=["--norm.groups=100000000000000"])
@example(argv=["--epochs=!!timestamp "])
@example(argv=["--epochs=!!int ''"])
@example(argv=["--norm.groups=!!bool x"])
@example(argv=["--lr=&a [*a]"])
def test_arbitrary_flags(file, argv):
    check(*argv)
