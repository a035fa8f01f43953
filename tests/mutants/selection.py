"""Which tests can notice a fault: those that execute its line, recorded once, or its neighbours if nobody saw any."""

import ast
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from faults import Fault, is_kernel
from processes import Answer, Job, Work

REDUNDANT = ("tests/norms/backends/triton/test_kernels.py::test_under_the_interpreter",)
"""Tests that only run others, which are run here one by one."""
RECORD_SECONDS = 1500.0
BUDGET = 30.0
"""Seconds of the processor that a fault's tests may take, as recorded: those that do not fit are not run."""
COLD_BUDGET = 45.0
"""The same, of tests under Triton's interpreter."""
LIMIT = 90.0
"""Seconds a fault at most."""
SLOW = 30.0
"""Seconds a file of tests: beyond, it runs once more unwatched, for watching a compiler takes longer than compiling."""
SITE = "import coverage\ncoverage.process_startup()\n"
Table = dict[str, Any]


def is_cold(file: str) -> bool:
    """Whether a file of tests needs TRITON_INTERPRET before triton is loaded."""
    return file.endswith("_interpreted.py")


def test_files(tree: Path, under: Iterable[str]) -> list[str]:
    """Return the files that hold tests, large ones first."""
    found = {
        path
        for place in under
        for pattern in ("test_*.py", "*_interpreted.py")
        for path in ([tree / place] if place.endswith(".py") else (tree / place).rglob(pattern))
        if "mutants" not in path.parts[len(tree.parts) :]
    }
    return [str(path.relative_to(tree)) for path in sorted(found, key=lambda path: (-path.stat().st_size, str(path)))]


def mirrored(file: str, folders: Iterable[str]) -> str:
    """Return the folder of tests that mirrors a source file's, or the nearest above it that has tests."""
    parts = Path(file).parent.parts
    parts = parts[1:] if parts[0] == "common" else parts
    while parts and "/".join(("tests", *parts)) not in folders:
        parts = parts[:-1]
    return "/".join(("tests", *parts))


def is_near(test: str, home: str) -> bool:
    """Whether a test is in a folder or one below it; of the outermost, which holds all, the files of its own count."""
    folder = Path(test.split("::", maxsplit=1)[0]).parent
    return folder == Path(home) if home == "tests" else folder.is_relative_to(home)


def session_job(file: str, **more: Any) -> Job:
    """Return a job for one file, in the environment it needs."""
    environment = {"OMP_NUM_THREADS": "1", "HYPOTHESIS_STORAGE_DIRECTORY": "/dev/null/none"}
    environment |= {"TRITON_INTERPRET": "1"} if is_cold(file) else {}
    environment |= more.pop("environment", {})
    return {"files": [file], "cold": is_cold(file), "environment": environment, "deselect": REDUNDANT, **more}


def settings(tree: Path, packages: Iterable[str]) -> str:
    """Return coverage.py's, for a session and the processes that its tests start."""
    include = "".join(f"\n  {tree / package}/*" for package in packages)
    return (
        f"[run]\nparallel = true\ndata_file = {tree.with_name(f'{tree.name}-scratch') / 'coverage'}\n"
        f"context = ${{MUTANTS_CONTEXT-}}\nconcurrency = thread, multiprocessing\npatch = _exit\n"
        f"disable_warnings = no-data-collected, dynamic-conflict, trace-changed, already-imported, couldnt-parse\n"
        f"include ={include}\n"
    )


def record(file: str, target: Path, packages: Iterable[str], site: Path) -> Callable[[Path], Work]:
    """Return the work of recording which lines each test of a file executes, subprocesses included, into target."""

    def work(tree: Path) -> Work:
        answer: Answer = {}
        if not is_cold(file):  # the interpreter takes minutes when watched
            rc = tree.with_name(f"{tree.name}.rc")
            rc.write_text(settings(tree, packages), encoding="utf-8")
            environment = {"COVERAGE_PROCESS_START": str(rc), "PYTHONPATH": str(site)}
            answer = yield session_job(file, environment=environment, coverage=str(rc), limit=RECORD_SECONDS)
        table: Table = {"durations": {}, "unseen": {}, "lines": answer.get("lines", {}), "broken": []}
        seen = {test: seconds for test, seconds in answer.get("durations", {}).items() if "lines" in answer}
        for test in [*answer.get("failed", ()), *answer.get("skipped", ())]:
            seen.pop(test, None)
        again = dict.fromkeys(answer["failed"], 0.0) if "lines" in answer else None
        if again is not None and sum(seen.values()) > SLOW:
            again |= seen
        if again is None or again:  # what failed, perhaps because it was watched; what took long, no doubt for that
            plain: Answer = yield session_job(file, tests=again, limit=RECORD_SECONDS, kernels=is_cold(file))
            table["lines"] = plain.get("lines", table["lines"])
            if "durations" in plain:
                bad = {*plain["failed"], *plain["skipped"]}
                good = {test: seconds for test, seconds in plain["durations"].items() if test not in bad}
                table["unseen"] = {test: seconds for test, seconds in good.items() if test not in seen}
                seen = {test: good.get(test, seconds) for test, seconds in seen.items() if test not in bad}
                table["broken"] = plain["failed"] and [*plain["failed"], *plain["messages"]]
            else:
                table["broken"] = [file, str(plain)[-400:]]
        table["durations"] = seen
        draft = target.with_suffix(".draft")
        draft.write_text(json.dumps(table), encoding="utf-8")
        draft.rename(target)
        return file, sum(table["durations"].values()) + sum(table["unseen"].values()), table["broken"]

    return work


def digest(tree: Path, files: Iterable[str]) -> str:
    """Return a digest of files and their contents."""
    result = hashlib.sha256()
    for file in sorted(files):
        result.update(file.encode() + b"\0" + hashlib.sha256((tree / file).read_bytes()).digest())
    return result.hexdigest()[:24]


class Selection:
    """All that was recorded."""

    def __init__(self, tree: Path, tables: dict[str, Table], patience: int):
        """Join the tables of the files of tests; patience multiplies the time a fault is given."""
        self.tree, self.patience = tree, patience
        self.files = list(tables)
        self.folders = {str(Path(file).parent) for file in tables}
        self.durations: dict[str, float] = {}
        self.unseen: set[str] = set()
        self.executed: dict[str, dict[int, set[str]]] = {}
        for table in tables.values():
            self.durations |= table["durations"] | table["unseen"]
            self.unseen |= set(table["unseen"])
            for source, rows in table["lines"].items():
                mine = self.executed.setdefault(source, {})
                for line, tests in rows.items():
                    mine.setdefault(int(line), set()).update(tests)
        self.of_file: dict[str, set[str]] = {}
        for test in self.durations:
            self.of_file.setdefault(test.split("::")[0], set()).add(test)

    def _expand(self, tests: Iterable[str], *, whole_files: bool = False) -> set[str]:
        """Replace files by their tests."""
        result: set[str] = set()
        for test in tests:
            if whole_files or "::" not in test:
                result |= self.of_file.get(test.split("::")[0], set())
            elif test in self.durations:
                result.add(test)
        return result

    def tests(self, fault: Fault) -> set[str]:
        """Return every test that may notice a fault."""
        home = mirrored(fault.file, self.folders)
        near = {test for test in self.durations if is_near(test, home)}
        rows = self.executed.get(fault.file, {})
        if is_kernel(fault.file):
            return self._expand(rows.get(fault.line, ())) or {test for test in near if is_cold(test.split("::")[0])}
        function, first, last = surroundings((self.tree / fault.file).read_text(encoding="utf-8"), fault.line)
        blind = near & self.unseen
        if function is not None:
            cached = any("cache" in ast.unparse(decorator) for decorator in function.decorator_list)
            for lines in (range(fault.line, fault.end + 1), range(first, last + 1)):
                if found := self._expand(set().union(*(rows.get(line, ()) for line in lines)), whole_files=cached):
                    return found | blind
        # Executed on import, in a process that no one watched, or by a compiler that reads code instead of running it.
        return near | self._expand(set().union(*rows.values()))

    def stages(self, fault: Fault) -> list[tuple[list[str], dict[str, float]]]:
        """Return sessions as (files, tests with their durations): near tests first, those of Triton apart."""
        home = mirrored(fault.file, self.folders)
        direct = self._expand(self.executed.get(fault.file, {}).get(fault.line, ()))
        groups: dict[int, dict[str, float]] = {}
        for test in self.tests(fault):
            file = test.split("::")[0]
            groups.setdefault(2 if is_cold(file) else 0 if is_near(test, home) else 1, {})[test] = self.durations[test]
        left, result = self.patience * BUDGET, []
        for number, group in sorted(groups.items()):
            left = self.patience * COLD_BUDGET if number == 2 else left
            chosen: dict[str, float] = {}
            for test in sorted(spread(group), key=lambda test: test not in direct):  # those that execute the line first
                if group[test] <= left or not (chosen or result or group[test] > LIMIT / 2):
                    chosen[test] = group[test]
                    left -= group[test]
            if chosen:
                result.append((sorted({test.split("::")[0] for test in chosen}), chosen))
        return result


def spread(durations: dict[str, float]) -> list[str]:
    """Order tests so that every function's fastest case comes before any function's second."""
    count: dict[str, int] = {}
    rank = {}
    for test in sorted(durations, key=lambda test: (durations[test], test)):
        name = test.split("[")[0]
        rank[test] = count[name] = count.get(name, 0) + 1
    return sorted(durations, key=lambda test: (rank[test], durations[test], test))


def surroundings(source: str, line: int) -> tuple[ast.FunctionDef | ast.AsyncFunctionDef | None, int, int]:
    """Return the innermost function that a line is executed in, if any, and the ends of its statement or header."""
    function, first, last = None, line, line
    for node in ast.walk(ast.parse(source)):  # outer nodes come first
        if not isinstance(node, ast.stmt) or not node.lineno <= line <= (node.end_lineno or line):
            continue
        body = getattr(node, "body", None)
        if body and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and line >= body[0].lineno:
            function = node
        elif isinstance(node, ast.ClassDef):
            continue
        first, last = node.lineno, max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or line
    return function, first, last


def compile_tests(files: list[str]) -> Callable[[Path], Work]:
    """Return the work of leaving bytecode of code and tests, which sessions with a fault do not write."""

    def work(tree: Path) -> Work:
        for cold in (False, True):
            if some := [file for file in files if is_cold(file) is cold]:
                yield session_job(some[0], collect=True, limit=RECORD_SECONDS) | {"files": some}

    return work


def judge(fault: Fault, selection: Selection) -> Callable[[Path], Work]:
    """Return the work of running a fault's tests with the fault in place."""

    def work(tree: Path) -> Work:
        path = tree / fault.file
        stat, original = path.stat(), path.read_text(encoding="utf-8")
        verdict: dict[str, Any] = {"id": fault.id, "verdict": "untested", "tests": 0, "seconds": 0.0, "by": ""}
        left = selection.patience * LIMIT

        def job(files: list[str], tests: dict[str, float] | None, limit: float) -> Job:
            more = {"environment": {"PYTHONDONTWRITEBYTECODE": "1"}}
            return session_job(files[0], tests=tests, stop=True, limit=limit, **more) | {"files": files}

        try:
            path.write_text(fault.text, encoding="utf-8")  # newer than any bytecode of it
            for files, tests in selection.stages(fault):
                limit = max(5.0, min(left, 20.0 + 3 * sum(tests.values())))
                answer: Answer = yield job(files, tests, limit)
                if answer.get("status") == 5:  # the fault changed the tests' names
                    answer = yield job(files, None, limit)
                verdict["tests"] += len(answer.get("durations", ()))
                spent = answer["seconds"]
                verdict["seconds"] += spent
                left -= spent
                if "timeout" in answer:
                    _restore(path, original, stat)
                    answer = yield job(files, tests, limit)
                    well = not answer.get("failed", True) and answer["seconds"] < limit / 2
                    return verdict | {"verdict": "caught" if well else "unjudged", "by": f"a limit of {limit:.0f} s"}
                if "died" in answer:
                    by = f"death, status {answer['died']}"
                    return verdict | {"verdict": "caught", "by": by, "message": answer["log"][-300:]}
                if answer["failed"]:
                    by, message = answer["failed"][0], (answer["messages"] or [""])[0]
                    return verdict | {"verdict": "caught", "by": by, "message": message[-300:]}
                if answer["status"] not in (0, 5):
                    return verdict | {"verdict": "caught", "by": f"pytest's status {answer['status']}"}
                verdict["verdict"] = "survived"
        finally:
            _restore(path, original, stat)
        return verdict

    return work


def _restore(path: Path, text: str, stat: Any) -> None:
    """Put a file back with its time, by which its bytecode counts as current."""
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
