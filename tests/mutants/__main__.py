"""Put faults into a copy of the tree, one at a time, and count those that the tests notice; docs/testing.md."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before anything loads torch or numpy
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

from faults import Fault, sample
from processes import drive, warm
from selection import SITE, Selection, compile_tests, digest, judge, record, test_files

ROOT = Path(__file__).parents[2]
ARGUED = Path("tests/mutants/argued.md")
GOAL = 0.9
RETRY_PATIENCE = 3
"""Times as long as the first time: few are left, and what did not fit then may have noticed."""


def arguments() -> argparse.Namespace:
    """Read the command line."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser = argparse.ArgumentParser(prog="make mutants ARGS=...", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="which sample is drawn")
    parser.add_argument("--count", type=int, default=300, help="faults, those of the Triton kernels included")
    parser.add_argument("--folders", nargs="+", default=[], help="draw from these folders of code only, and below them")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="run tests of these folders or files only")
    parser.add_argument("--workers", type=int, default=2, help="faults at a time, each with one thread")
    parser.add_argument("--state", type=Path, default=cache / "mutants" / ROOT.name, help="where a run can be resumed")
    parser.add_argument("--retry", action="store_true", help="take the tests anew and try what no test noticed again")
    parser.add_argument("--fresh", action="store_true", help="take code and tests anew and begin from nothing")
    return parser.parse_args()


def tracked() -> list[str]:
    """Return the files of the tree that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    return sorted({name for name in names if name and (ROOT / name).is_file() and not (ROOT / name).is_symlink()})


def links() -> list[str]:
    """Return the links inside the tree, such as that to a package's configurations."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_symlink()]


def copy_tree(target: Path) -> None:
    """Copy the tree, in the past, so that a fault written later is newer, and make it a checkout of its own."""
    shutil.rmtree(target, ignore_errors=True)
    for name in tracked():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target / name)
        os.utime(target / name, (1e9, 1e9))
    for name in links():
        (target / name).symlink_to((ROOT / name).readlink())
    identity = ["-c", "user.name=mutants", "-c", "user.email=mutants@localhost", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "A copy"]):
        subprocess.run(["git", *command], cwd=target, check=True)


def is_code(name: str) -> bool:
    """Whether results of tests may depend on a file that is not a test."""
    return not name.startswith(("tests/", "docs/", ".git")) and not name.endswith(".md")


def is_shared(name: str) -> bool:
    """Whether a file under tests is used by several files of tests."""
    return name.startswith("tests/") and (name.startswith("tests/helpers/") or name.endswith("conftest.py"))


def files_below(tree: Path) -> list[str]:
    """Return the files of a copy of the tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=tree, capture_output=True, check=True, text=True)
    return [name for name in listed.stdout.split("\0") if name and not (tree / name).is_symlink()]


def packages(tree: Path) -> list[str]:
    """Return the packages of a tree, which say that they are typed."""
    return sorted(path.parent.name for path in tree.glob("*/py.typed"))


def source_folders(tree: Path, only: list[str]) -> dict[str, list[str]]:
    """Return the files of each folder of code, or of those in only and below them."""
    folders: dict[str, list[str]] = {}
    for name in files_below(tree):
        chosen = not only or any(Path(name).is_relative_to(place) for place in only)
        if name.endswith(".py") and name.split("/")[0] in packages(tree) and chosen:
            folders.setdefault(str(Path(name).parent), []).append(name)
    return folders


def argued(page: Path) -> dict[str, str]:
    """Return the faults that need not be caught, by key, with the reason."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    entries = re.split(r"\n(?=- |\n)", text)  # an entry may go on in lines of its own
    found = (re.fullmatch(r"\n?- (`[^`]+\.py`: `.*` -> `.*`):\s+(.+)", entry, re.DOTALL) for entry in entries)
    return {match[1]: match[2] for match in found if match}


def report(faults: list[Fault], verdicts: dict[str, dict[str, Any]], reasons: dict[str, str]) -> tuple[str, bool]:
    """Return the report, and whether enough was caught."""
    rows: dict[str, Counter[str]] = {}
    blocks = []
    for fault in faults:
        verdict = verdicts.get(fault.id, {"verdict": "not run"})
        kind = verdict["verdict"]
        if kind != "caught" and fault.key in reasons:
            kind = "argued"
        rows.setdefault(str(Path(fault.file).parent), Counter())[kind] += 1
        if kind not in ("caught", "argued", "not run"):
            ran = f"{kind}; {verdict['tests']} tests ran in {verdict['seconds']:.1f} s {verdict['by']}".strip()
            place = f"### {fault.file}:{fault.line} ({fault.operator}; {ran})"
            blocks.append(f"{place}\n\n```diff\n{fault.diff}```\n\n- {fault.key}: \n")
    total = sum(rows.values(), Counter())
    kinds = ("caught", "argued", "survived", "untested", "unjudged", "not run")

    def row(name: str, counts: Counter[str]) -> str:
        matter = sum(counts.values()) - counts["argued"] - counts["not run"]
        rate = f"{counts['caught'] / matter:.0%}" if matter else "-"
        return f"| {name} | {sum(counts.values())} | " + " | ".join(str(counts[k]) for k in kinds) + f" | {rate} |"

    matter = sum(total.values()) - total["argued"]
    head = "| folder | faults | " + " | ".join(kinds) + " | caught of those that matter |"
    lines = [head, "|---" * (len(kinds) + 3) + "|"]
    lines += [*(row(name, rows[name]) for name in sorted(rows)), row("all", total)]
    stale = sorted(set(reasons) - {fault.key for fault in faults})
    remark = f"\n{len(stale)} argued faults are not in this sample.\n" if stale else ""
    text = "\n".join(lines) + "\n" + remark + "\n## Not caught, not argued\n\n" + ("\n".join(blocks) or "none\n")
    return text, bool(matter) and total["caught"] >= GOAL * matter


class Run:
    """A sample in a folder: copies of the tree, what was recorded, the faults, the verdicts so far."""

    def __init__(self, options: argparse.Namespace):
        """Take up what the folder holds, or draw a sample."""
        self.folder: Path = options.state.absolute()
        self.retry: bool = options.retry
        if options.fresh:
            shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "map").mkdir(parents=True, exist_ok=True)
        (self.folder / "site").mkdir(exist_ok=True)
        (self.folder / "site" / "sitecustomize.py").write_text(SITE, encoding="utf-8")
        self.trees = [self.folder / f"tree-{number}" for number in range(options.workers)]
        self.tree = self.trees[0]
        self.results = self.folder / "results.jsonl"
        self.plan = self._plan(options)
        for target in self.trees[1:]:
            if not target.exists():
                shutil.copytree(self.tree, target)
        for target in self.trees:  # a run that was killed may have left its fault there
            subprocess.run(["git", "checkout", "-q", "--", "."], cwd=target, check=True)
        self.faults = {fault.id: fault for fault in (Fault(**fields) for fields in self.plan["faults"])}
        lines = self.results.read_text(encoding="utf-8").splitlines() if self.results.exists() else []
        self.verdicts: dict[str, dict[str, Any]] = {(entry := json.loads(line))["id"]: entry for line in lines}
        if options.retry:
            self.verdicts = {name: entry for name, entry in self.verdicts.items() if entry["verdict"] == "caught"}
            text = "".join(json.dumps(entry) + "\n" for entry in self.verdicts.values())
            self.results.write_text(text, encoding="utf-8")
        self.tests = test_files(self.tree, self.plan["asked"]["tests"])

    def _plan(self, options: argparse.Namespace) -> dict[str, Any]:
        """Return the plan in the folder if it is the one asked for, or a new one."""
        file = self.folder / "plan.json"
        asked = {name: getattr(options, name) for name in ("seed", "count", "folders", "tests")}
        names = tracked()
        digests = {"code": digest(ROOT, filter(is_code, names)), "everything": digest(ROOT, names)}
        plan = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        if plan and plan["asked"] != asked:
            plan = None  # what was recorded of unchanged tests still holds
        if options.retry:
            if not plan or plan["code"] != digests["code"]:
                sys.exit("--retry: there is no such sample of this code; leave --retry out")
        elif plan:
            if plan["everything"] != digests["everything"]:
                print(
                    "the tree has changed since: this goes on with its copy; --retry takes the tests anew, --fresh all"
                )
            return plan
        for target in self.trees:
            copy_tree(target)
        if not plan:
            self.results.unlink(missing_ok=True)
            try:
                faults = sample(self.tree, source_folders(self.tree, options.folders), options.seed, options.count)
            except ValueError as error:
                sys.exit(str(error))
            plan = {"faults": [asdict(fault) for fault in faults]}
        plan |= {"asked": asked, **digests}
        file.write_text(json.dumps(plan), encoding="utf-8")
        return plan

    def record(self) -> Selection:
        """Record which lines tests execute, where that is not known of the same tests and code."""
        names = files_below(self.tree)
        shared = digest(self.tree, [*filter(is_code, names), *filter(is_shared, names)])
        tables = {file: self.folder / "map" / f"{shared}-{digest(self.tree, [file])}.json" for file in self.tests}
        missing = [file for file in self.tests if not tables[file].exists()]
        print(f"{len(missing)} of {len(self.tests)} files of tests to record", flush=True)
        works = [record(file, tables[file], packages(self.tree), self.folder / "site") for file in missing]
        for file, seconds, broken in drive(works, self.trees, ROOT):
            print(f"recorded {file}: {seconds:.1f} s" + (f"; not used: {broken}" if broken else ""), flush=True)
        found = {file: json.loads(table.read_text(encoding="utf-8")) for file, table in tables.items()}
        return Selection(self.tree, found, RETRY_PATIENCE if self.retry else 1)

    def judge(self, selection: Selection) -> None:
        """Run the tests of every fault that has no verdict."""
        known = argued(ROOT / ARGUED)
        waiting = [fault for name, fault in self.faults.items() if name not in self.verdicts and fault.key not in known]
        if waiting:
            list(drive([compile_tests(self.tests)] * len(self.trees), self.trees, ROOT))
        with self.results.open("a", encoding="utf-8") as results:
            for verdict in drive((judge(fault, selection) for fault in waiting), self.trees, ROOT):
                self.verdicts[verdict["id"]] = verdict
                results.write(json.dumps(verdict) + "\n")
                results.flush()
                fault = self.faults[verdict["id"]]
                count = f"[{len(self.verdicts)}/{len(self.faults)}]"
                note = f"{verdict['verdict']} {verdict['seconds']:.1f} s {fault.file}:{fault.line} {verdict['by']}"
                print(count, note, flush=True)


def main() -> int:
    """Run what is left of a sample and print the report."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an interruption: sessions end, files are put back
    run = Run(arguments())
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(run.folder / "inductor")
    print(f"{len(run.faults)} faults, {len(run.verdicts)} judged; state in {run.folder}", flush=True)
    warm()
    begin = time.monotonic()
    selection = run.record()
    middle = time.monotonic()
    run.judge(selection)
    text, enough = report(list(run.faults.values()), run.verdicts, argued(ROOT / ARGUED))
    text = (
        f"# {len(run.faults)} faults, seed {run.plan['asked']['seed']}\n\nRecorded in {(middle - begin) / 60:.1f} "
        f"minutes, judged in {(time.monotonic() - middle) / 60:.1f}, as far as this run did it.\n\n{text}"
    )
    (run.folder / "report.md").write_text(text, encoding="utf-8")
    print(f"{text}\n{run.folder / 'report.md'}")
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
