"""Which faults can be put where: mutmut's operators over a tree, a sample of them, and the kernels' own list."""

import ast
import difflib
import hashlib
import random
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libcst as cst
import libcst.matchers as m
from libcst.metadata import CodeRange, MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_arg_removal, operator_assignment, operator_string

KERNELS = Path(__file__).with_name("kernels.toml")
AT_LEAST = 3
"""Faults a folder, however small."""
QUIET = m.Call(
    func=m.Name("print")
    | m.Attribute(value=m.Name("warnings"), attr=m.Name("warn"))
    | m.Attribute(attr=m.OneOf(*map(m.Name, ("debug", "info", "warning", "error", "exception"))))
)
"""Calls that only say something."""
UNTOUCHED = (cst.Annotation, cst.Import, cst.ImportFrom, cst.TypeAlias, cst.ConcatenatedString)
LOOKED_AT = (cst.Expr, cst.Assign, cst.Call, cst.If)
LEFT_ALONE = (
    m.Expr(value=m.SimpleString())
    | m.Assign(targets=[m.AssignTarget(m.Name("__all__"))])
    | m.Call(func=m.OneOf(*map(m.Name, ("isinstance", "len", "TypeVar", "cast"))))
    | m.If(test=m.Name("TYPE_CHECKING") | m.Attribute(attr=m.Name("TYPE_CHECKING")))
)
"""Docstrings, lists of names, types, and what mutmut leaves alone itself."""


Make = Callable[[], "Fault | None"]
"""Makes a fault only when it is called; None where it would change nothing, or is no Python."""


@dataclass(frozen=True)
class Fault:
    """One change of one file."""

    file: str
    line: int
    """Of the tree without the fault, as is the next."""
    end: int
    operator: str
    text: str
    """Of the whole file with the fault in it."""
    diff: str

    @property
    def key(self) -> str:
        """What a list of argued faults knows it by: the file and the changed lines, wherever in the file they are."""
        lines = self.diff.splitlines()[2:]
        old, new = (" / ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")
        return f"`{self.file}`: `{old}` -> `{new}`".replace("``", "`(nothing)`")

    @property
    def id(self) -> str:
        """A name for the records of a run."""
        return f"{self.file}:{self.line}:{hashlib.sha256(self.diff.encode()).hexdigest()[:8]}"


def negated(node: cst.If | cst.While | cst.IfExp | cst.Assert) -> Iterator[cst.CSTNode]:
    """Do the opposite of what a condition says."""
    inner = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    yield node.with_changes(test=cst.UnaryOperation(operator=cst.Not(), expression=inner))


def call_dropped(node: cst.Expr) -> Iterator[cst.CSTNode]:
    """Leave out a call made for its effect."""
    if isinstance(node.value, cst.Call):
        yield cst.Pass()


OPERATORS: list[tuple[type, Callable[[Any], Iterable[cst.CSTNode]]]] = [
    *mutation_operators,
    (cst.If, negated),
    (cst.While, negated),
    (cst.Expr, call_dropped),
]


def speaks(node: cst.CSTNode) -> bool:
    """Whether texts within a node are messages."""
    return isinstance(node, cst.Raise) or (isinstance(node, cst.Call) and m.matches(node, QUIET))


class Finder(cst.CSTVisitor):
    """Every fault of a module as (first line, last line, operator, node, new node), but in what only speaks."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        """Begin with nothing found."""
        self.found: list[tuple[int, int, str, cst.CSTNode, cst.CSTNode]] = []
        self._mute = 0

    def on_visit(self, node: cst.CSTNode) -> bool:
        """Collect the faults of a node, and say whether its children have any."""
        if isinstance(node, UNTOUCHED) or (isinstance(node, LOOKED_AT) and m.matches(node, LEFT_ALONE)):
            return False
        if not isinstance(node, cst.Expr) or not m.matches(node, m.Expr(value=QUIET)):
            for kind, operator in OPERATORS:
                if isinstance(node, kind) and not self._speaks(node, operator):
                    place = self.get_metadata(PositionProvider, node, None)
                    assert isinstance(place, CodeRange)
                    end = place.start.line if hasattr(node, "body") else place.end.line
                    for new in operator(node):
                        self.found.append((place.start.line, end, operator.__name__, node, new))
        self._mute += speaks(node)
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        """Leave what only speaks."""
        self._mute -= speaks(original_node)

    def _speaks(self, node: cst.CSTNode, operator: Callable[..., Any]) -> bool:
        """Whether the fault would change wording: text of messages, or any text with words apart."""
        if operator is operator_string:
            words = isinstance(node, cst.SimpleString) and re.search(r"[a-z,.:;] [a-z]", node.value)
            return bool(self._mute or words)
        return operator is operator_arg_removal and m.matches(node, QUIET)


def diff(file: str, old: str, new: str) -> str:
    """Return a unified diff of a file."""
    lines = (old.splitlines(keepends=True), new.splitlines(keepends=True))
    return "".join(difflib.unified_diff(*lines, f"a/{file}", f"b/{file}", n=2))


def enumerate_file(tree: Path, file: str) -> dict[int, dict[str, list[Make]]]:
    """Return the faults of a file by line and operator."""
    source = (tree / file).read_text(encoding="utf-8")
    wrapper = MetadataWrapper(cst.parse_module(source))
    finder = Finder()
    wrapper.visit(finder)
    found: dict[int, dict[str, list[Make]]] = {}
    for line, end, operator, node, new in finder.found:

        def make(line=line, end=end, operator=operator, node=node, new=new) -> Fault | None:
            text = wrapper.module.deep_replace(node, new)
            assert isinstance(text, cst.Module)
            try:
                changed = ast.dump(ast.parse(text.code)) != ast.dump(ast.parse(source))
                compile(text.code, file, "exec")
            except SyntaxError:
                return None
            if not changed:
                return None
            return Fault(file, line, end, operator, text.code, diff(file, source, text.code))

        found.setdefault(line, {}).setdefault(operator, []).append(make)
    return found


def code_lines(source: str) -> int:
    """Count the lines that statements other than docstrings stand on."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            lines.update(range(node.lineno, node.body[0].lineno if hasattr(node, "body") else node.end_lineno + 1))  # type: ignore[attr-defined]
    return len(lines)


def shares(weights: dict[str, int], count: int) -> dict[str, int]:
    """Split count in proportion to weights, with at least AT_LEAST for everyone; remainders go to the largest."""
    weights = {name: weight for name, weight in weights.items() if weight}
    least = min(AT_LEAST, count // max(1, len(weights)))
    free = count - least * len(weights)
    exact = {name: free * weight / sum(weights.values()) for name, weight in weights.items()}
    result = {name: least + int(part) for name, part in exact.items()}
    for name in sorted(exact, key=lambda name: int(exact[name]) - exact[name])[: max(0, count - sum(result.values()))]:
        result[name] += 1
    return result


def is_kernel(file: str) -> bool:
    """Whether Triton, not Python, runs a file."""
    return file.endswith("_kernels.py")


def kernel_faults(tree: Path) -> list[Fault]:
    """Return the project's own faults of the kernels.

    Raises:
        ValueError: if one no longer fits the code, or has the name of another.
    """
    found: list[Fault] = []
    for entry in tomllib.loads(KERNELS.read_text(encoding="utf-8"))["fault"]:
        source = (tree / entry["file"]).read_text(encoding="utf-8")
        if source.count(entry["old"]) != 1:
            raise ValueError(
                f"{KERNELS.name}: {entry['what']}: {entry['old']!r} should be in {entry['file']} once, "
                f"is {source.count(entry['old'])} times"
            )
        if entry["new"] == entry["old"] or (entry["file"], entry["what"]) in {(f.file, f.operator) for f in found}:
            raise ValueError(f"{KERNELS.name}: {entry['what']}: changes nothing, or is there twice")
        new = source.replace(entry["old"], entry["new"])
        compile(new, entry["file"], "exec")  # a SyntaxError says where
        line = source[: source.index(entry["old"])].count("\n") + 1
        end = line + entry["old"].count("\n")
        found.append(Fault(entry["file"], line, end, entry["what"], new, diff(entry["file"], source, new)))
    return found


def mixed(choices: dict[str, list[Make]], generator: random.Random) -> list[Make]:
    """Return a line's faults in the order of preference: every operator once, in turn.

    A None where there should be a value is the commonest fault that operators make, and the easiest to notice: two
    times out of three it comes last.
    """
    names = list(choices)
    generator.shuffle(names)
    if generator.random() < 2 / 3:
        names.sort(key=lambda name: name in (operator_arg_removal.__name__, operator_assignment.__name__))
    for name in names:
        generator.shuffle(choices[name])
    return [make for name in names for make in choices[name]]


def sample(tree: Path, folders: dict[str, list[str]], seed: int, count: int) -> list[Fault]:
    """Draw count faults, the kernels' own included, at most one a line, each folder's from a generator of its own."""
    own = [fault for fault in kernel_faults(tree) if str(Path(fault.file).parent) in folders]
    plain = {folder: [file for file in files if not is_kernel(file)] for folder, files in folders.items()}
    weights = {
        folder: sum(code_lines((tree / file).read_text(encoding="utf-8")) for file in files)
        for folder, files in plain.items()
    }
    drawn = []
    for folder, share in shares(weights, max(0, count - len(own))).items():
        generator = random.Random(f"{seed} {folder}")
        makers = {file: enumerate_file(tree, file) for file in plain[folder]}
        places = [(file, at) for file in plain[folder] for at in sorted(makers[file])]
        generator.shuffle(places)
        taken = 0
        for file, at in places:
            if taken == share:
                break
            fault = next(filter(None, (make() for make in mixed(makers[file][at], generator))), None)
            if fault:
                drawn.append(fault)
                taken += 1
    return drawn + own
