"""One pytest session in a process of its own, told what to do and what to write down by a job in JSON.

Forked from a process that has torch loaded, or started as a command where Triton must find TRITON_INTERPRET set.
"""

import inspect
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest

DATA_BYTES = 8 << 30
"""A fault may ask for any amount of memory; the machine is not only ours."""


def processor_seconds() -> float:
    """Return what this process and those it has waited for have used."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Watch:
    """Choose and order the tests of a session, and note what became of them and how long each took."""

    def __init__(self, job: dict[str, Any], coverage: Any = None):
        """Take the job's "tests" (durations by name, or None for all) and "stop" (at the first failure)."""
        self.wanted: dict[str, float] | None = job.get("tests")
        self.durations: dict[str, float] = {}
        self.failed: list[str] = []
        self.messages: list[str] = []
        self.skipped: list[str] = []
        self.contexts: list[str] = []
        self.coverage = coverage
        self.kernels: dict[str, dict[int, set[str]]] = {}
        self.test = ""

    def follow_kernels(self, tree: Path) -> None:
        """Note which tests run which functions of Triton, all lines of each: the interpreter hides the rest."""
        from triton.runtime.interpreter import InterpretedFunction  # noqa: PLC0415 - of a cold session only

        rewrite = InterpretedFunction.rewrite

        def noted(function: Any) -> Any:
            lines, first = inspect.getsourcelines(function.fn)
            file = Path(function.fn.__code__.co_filename)
            if file.is_relative_to(tree):
                table = self.kernels.setdefault(str(file.relative_to(tree)), {})
                for line in range(first, first + len(lines)):
                    table.setdefault(line, set()).add(self.test)
            return rewrite(function)

        InterpretedFunction.rewrite = noted  # pyright: ignore[reportAttributeAccessIssue]

    def pytest_collection_modifyitems(self, items: list[pytest.Item], config: pytest.Config) -> None:
        """Keep the tests wanted, each file's fastest first, quick files first."""
        if self.wanted is None:
            return
        kept = [item for item in items if item.nodeid in self.wanted]
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in self.wanted])
        files: dict[str, float] = {}
        for item in kept:
            file = item.nodeid.split("::")[0]
            files[file] = files.get(file, 0.0) + self.wanted[item.nodeid]
        items[:] = sorted(
            kept, key=lambda item: (files[f := item.nodeid.split("::")[0]], f, (self.wanted or {})[item.nodeid])
        )

    def _switch(self, context: str) -> None:
        """Attribute what is executed from here on, by subprocesses too, to a test or to every test of a file."""
        if self.coverage is not None:
            self.contexts.append(context)
            self.coverage.switch_context(str(len(self.contexts) - 1))
            os.environ["MUTANTS_CONTEXT"] = str(len(self.contexts) - 1)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        """Take a test's time, the processor's: the machine may be busy with other things."""
        self.test = item.nodeid
        self._switch(item.nodeid)
        start = processor_seconds()
        result = yield
        self.durations[item.nodeid] = processor_seconds() - start
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: pytest.FixtureRequest):
        """What a fixture that tests share executes is executed by each of them."""
        if fixturedef.scope == "function" or self.coverage is None:
            return (yield)
        before = self.contexts[-1]
        self._switch(before.split("::")[0])
        try:
            return (yield)
        finally:
            self._switch(before)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note failures."""
        if report.failed:
            self.failed.append(report.nodeid)
            self.messages.append(report.longreprtext[-600:])
        elif report.skipped:
            self.skipped.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note files that cannot be read."""
        if report.failed:
            self.failed.append(report.nodeid)
            self.messages.append(report.longreprtext[-600:])


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job's tests in this process, whose state is changed for good, and return what came of it."""
    tree, scratch = Path(job["tree"]), Path(job["scratch"])
    os.chdir(tree)
    resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ.update(job["environment"])
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    here = str(Path(__file__).parent)
    sys.path[:] = [str(tree), *(entry for entry in sys.path if entry not in ("", here, job["root"]))]
    sys.argv = ["pytest"]
    import hypothesis  # noqa: PLC0415 - a plugin of pytest's, loaded by it in any case

    # A verdict must repeat, and must not depend on the load of the machine.
    hypothesis.settings.register_profile("mutants", derandomize=True, database=None, deadline=None)
    hypothesis.settings.load_profile("mutants")
    coverage = None
    if "coverage" in job:
        from coverage import Coverage  # noqa: PLC0415 - only where lines are recorded

        coverage = Coverage(config_file=job["coverage"])
        coverage.start()
    watch = Watch(job, coverage)
    if job.get("kernels"):
        watch.follow_kernels(tree)
    options = ["-p", "no:cacheprovider", "-q", "--no-header", "--tb=short", "-o", "console_output_style=classic"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins that were loaded before the fork
    if job.get("stop"):
        options.append("-x")
    if job.get("collect"):
        options.append("--collect-only")
    options += [f"--deselect={test}" for test in job.get("deselect", ())]
    options += [f"--rootdir={tree}", f"-c{tree / 'pyproject.toml'}", f"--basetemp={scratch / 'pytest'}"]
    status = int(pytest.main([*options, *job["files"]], plugins=[watch]))
    answer: dict[str, Any] = {
        "status": status,
        "durations": watch.durations,
        "failed": list(dict.fromkeys(watch.failed)),
        "messages": watch.messages[:3],
        "skipped": watch.skipped,
    }
    if coverage is not None:
        coverage.stop()
        coverage.save()
        answer["lines"] = lines(job, watch.contexts)
    if job.get("kernels"):
        answer["lines"] = {file: {n: sorted(t) for n, t in table.items()} for file, table in watch.kernels.items()}
    return answer


def lines(job: dict[str, Any], contexts: list[str]) -> dict[str, dict[int, list[str]]]:
    """Return the tests, or files for all their tests, that executed each line, by source file."""
    from coverage import CoverageData  # noqa: PLC0415

    tree = Path(job["tree"])
    found: dict[str, dict[int, set[str]]] = {}
    for file in sorted(Path(job["scratch"]).glob("coverage.*")):
        data = CoverageData(str(file))
        data.read()
        for source in data.measured_files():
            table = found.setdefault(str(Path(source).relative_to(tree)), {})
            for line, numbers in data.contexts_by_lineno(source).items():
                # The static context of a subprocess that a dynamic one refines is "static|dynamic".
                table.setdefault(line, set()).update(contexts[int(n.split("|")[0])] for n in numbers if n)
    return {source: {line: sorted(tests) for line, tests in table.items() if tests} for source, table in found.items()}


def main(path: str) -> None:
    """Run the job in a file and leave the answer beside it, whole or not at all."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    answer = run(job)
    draft = Path(path).with_suffix(".draft")
    draft.write_text(json.dumps(answer), encoding="utf-8")
    draft.rename(job["answer"])


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)
