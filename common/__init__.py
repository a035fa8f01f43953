"""What every application shares: layers, data, metrics, runs."""

import os
import sys
from pathlib import Path
from types import TracebackType

__version__ = (Path(__file__).parent / "norms" / "VERSION").read_text(encoding="utf-8").strip()


def _in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say in a line, as `run_command` later does, that Ctrl-C came while torch was being loaded."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped at once", file=sys.stderr)
        sys.exit(130)
    sys.__excepthook__(kind, error, trace)


# OpenMP's threads spin while they wait for each other. That costs little on an idle machine and nearly everything on
# one whose cores others use too: 224 images/s against 405. Our commands let them spin shorter, unless the user has said
# how threads wait. OpenMP reads this when torch loads it. Python imports a command's packages before the command, this
# one first; while it looks for the MODULE of "-m MODULE", sys.argv[0] is "-m".
if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].removeprefix("-m").partition(".")[0] in (
    "common",
    "cbgan",
    "cbda",
    "cbcls",
):
    sys.excepthook = _in_one_line
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "100000"
