"""Configuration: dataclass defaults, then YAML files, then flags; the later one wins.

jsonargparse reads files and flags and checks types; this module turns each of its complaints into one line that
names the field, the value and what would be right, and builds the (frozen, nested) dataclasses.
"""

import argparse
import dataclasses
import difflib
import functools
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings

from common.cli.configurations import with_own_files
from common.cli.fields import names_of
from common.cli.plugins import MissingPlugin, load_plugins
from common.errors import UsageError
from common.machine.paths import expanded

T = TypeVar("T")

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a field's text is its --help

_MISFIT = "config: a YAML tag, such as !!bool, does not fit the value after it; leave the tag out"
_read_yaml = get_loader("yaml")


RENAMED = {("data", "groups"): "superclasses"}
"""Settings by the names they had in older files, and their names now."""


def _read_any_yaml(text: str) -> Any:
    """Read YAML; PyYAML fails on a tag that does not fit its value, such as !!timestamp x, in whatever way it does."""
    try:
        values = _read_yaml(text)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise yaml.YAMLError(f"a tag does not fit its value: {error}") from None
    for (group, old), new in RENAMED.items():
        inner = values.get(group) if isinstance(values, dict) else None
        if isinstance(inner, dict) and old in inner and new not in inner:
            inner[new] = inner.pop(old)
            _warn_once(f"{group}.{old}: is called {group}.{new} now; read as that")
    return values


@functools.cache  # a configuration is read more than once
def _warn_once(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


set_loader("yaml", _read_any_yaml, exceptions=(yaml.YAMLError,))

_TYPE_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "Path": "a path",
    "NoneType": "null",
}


def parse(cls: type[T], argv: Sequence[str] | None = None, *, prog: str | None = None) -> T:
    """Build a configuration from its dataclass defaults, ``--config`` files and flags, in this order.

    Where it has a setting ``plugins``, these modules are imported before the other settings are checked.

    Args:
        cls: a frozen dataclass; fields may be dataclasses. A ``__post_init__`` that raises ValueError names the
            field with its full dotted path.
        argv: the command line without the program's name; ``sys.argv`` by default.
        prog: what ``--help`` calls the program.

    Raises:
        UsageError: one line, for anything wrong in a file or flag.
        SystemExit: with status 0, after ``--help`` or ``--print_config``.
    """
    try:
        values = read(cls, argv, prog=prog)
        if isinstance(plugins := values.get("plugins"), list):
            load_plugins(plugins)
        return _build(cls, values)
    except MissingPlugin as error:
        raise MissingPlugin(_printable(str(error))) from error
    except UsageError as error:
        raise UsageError(_printable(str(error))) from None


def read(cls: type, argv: Sequence[str] | None = None, *, prog: str | None = None) -> dict[str, Any]:
    """Return the nested plain values that ``parse`` builds a configuration from, each of its field's type.

    Raises:
        UsageError, SystemExit: as ``parse``, but for what only the whole configuration can refuse.
    """
    given = with_own_files(sys.argv[1:] if argv is None else argv, cls.__module__.partition(".")[0])
    if {"-h", "--help"} & set(given) and any(field.name == "plugins" for field in dataclasses.fields(cls)):
        load_plugins(_plugins_in(given))  # so that the help lists what they add
    parser = _parser(cls, prog)
    try:
        return parser.parse_args(given).as_dict()
    except RecursionError:
        raise UsageError("config: a YAML file refers to itself; expected plain values") from None
    except (AttributeError, IndexError):  # of flags, jsonargparse reads some without the loader above
        raise UsageError(_MISFIT) from None
    except UsageError as error:  # it quotes what was given, which may hold anything
        raise UsageError(_printable(str(error))) from None


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as nested plain values, ready for YAML or JSON (paths become text)."""
    return {
        field.name: to_dict(value)
        if dataclasses.is_dataclass(value := getattr(config, field.name))
        else (str(value) if isinstance(value, Path) else value)
        for field in dataclasses.fields(config)
    }


def to_yaml(config: Mapping[str, Any]) -> str:
    """Return nested plain values as YAML, keys in the order they have."""
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("norm.kind", "ucb") pairs of nested values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parser(cls: type, prog: str | None) -> "_Parser":
    parser = _Parser(prog=prog, description=cls.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--config",
        action="config",
        help="a YAML file, or one of the command's own by its name; may be given again, the later wins",
    )
    parser.add_class_arguments(cls)
    names = dict(names_of(cls))
    for action in parser._actions:
        if action.dest in names:
            action.metavar = f"{{{','.join(names[action.dest])}}}"
        hint = getattr(action, "_typehint", None)
        if hint is bool or bool in typing.get_args(hint):  # so that --resume means --resume true
            action.nargs, action.const = "?", True  # pyright: ignore[reportAttributeAccessIssue]
        elif typing.get_origin(hint) is list:  # so that --runs A B means --runs '[A, B]'
            (action._typehint,) = typing.get_args(hint)  # pyright: ignore[reportAttributeAccessIssue]
            action.nargs, action.metavar = "+", action.dest.upper()
            action.option_strings = [f"--{action.dest}"]
    return parser


def _plugins_in(argv: Sequence[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--plugins", nargs="+", default=[])
    try:
        return parser.parse_known_args(argv)[0].plugins
    except argparse.ArgumentError:
        return []


class _Parser(ArgumentParser):
    """An ArgumentParser that raises UsageError with one line instead of printing usage and a paragraph."""

    _file: object = None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        line = _MISFIT if type(ex) is KeyError else _one_line(message, known)
        if match := re.search(r"(\S+): expected .*, got NestedArg\(key='([^']*)'", line):  # of --epochs.x 3
            name = f"--{match[1]}.{match[2]}"
            line = f"{name}: no such option{_hint(name, known)}"
        raise UsageError(f"config: {self._file}: {line}" if self._file else line) from None

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Namespace:
        before, self._file = self._file, cfg_path
        try:
            values = super().parse_path(cfg_path, *args, **kwargs)
            self._refuse_unknown_groups(yaml.safe_load(Path(cfg_path).read_text(encoding="utf-8")))
            return values
        except UsageError:
            raise
        except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError, TypeError, ValueError) as error:
            self.error(f"cannot be read as YAML settings ({error})", error)
        finally:
            self._file = before

    def _refuse_unknown_groups(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """Refuse a misspelt group that is empty, which jsonargparse drops without a word."""
        known = [option[2:] for action in self._actions for option in action.option_strings]
        for key, value in values.items():
            if isinstance(value, Mapping):
                if not any(name.startswith(f"{prefix}{key}.") for name in known):
                    self.error(f"Option '{prefix}{key}' is not accepted")
                self._refuse_unknown_groups(value, f"{prefix}{key}.")


def _one_line(message: str, known: Sequence[str]) -> str:
    """Reword a jsonargparse message as one line: field, value, what would be right."""
    if match := re.match(r"unrecognized arguments: (\S+)", message):
        name = match[1].split("=")[0]
        hint = _hint(name, known) if name.startswith("-") else _option_for(match[1], known)
        return f"{name}: no such option{hint}"
    if match := re.search(r"Group '([^']+)' does not accept option '([^']+)'", message):
        name = f"{match[1]}.{match[2]}"
        return f"{name}: no such setting{_hint(name, [option[2:] for option in known])}"
    if match := re.search(r"Option '([^']+)' is not accepted", message):
        return f"{match[1]}: no such setting{_hint(match[1], [option[2:] for option in known])}"
    if match := re.match(r"argument --(\S+): expected (?:one|at least one) argument", message):
        return f"{match[1]}: a value is missing after --{match[1]}"
    if match := re.search(r"Unexpected config: (.*)", message, re.DOTALL):
        got = " ".join(match[1].split()) or "an empty file"
        return f"expected settings as 'name: value' lines, got {got}"
    if match := re.match(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL):
        return f"{match[1]}: {_expectation(match[2])}"
    return " ".join(message.split())


def _expectation(message: str) -> str:
    if match := re.match(r"Expected an? (.*)\. Got value: (.*)", message, re.DOTALL):
        return f"expected {_type_name(match[1])}, got {match[2].strip()}"
    wanted = re.findall(r"^\s*- Expected an? (.*?)\.?$", message, re.MULTILINE)
    given = re.search(r"Given value: (.*)", message)
    if match := re.search(r"Subtypes: \[(.*)\]", message):
        wanted = re.findall(r"<class '[^']+'>|typing\.Literal\[[^\]]*\]", match[1]) or wanted
    if wanted and given:
        return f"expected {' or '.join(_type_name(name) for name in wanted)}, got {given[1]}"
    if match := re.match(r"Unable to load config '(.*?)'", message, re.DOTALL):
        return f"expected settings such as {{name: value}} or a YAML file, got {match[1]}"
    if match := re.match(r"File does not exist: '(.*)'", message):
        return f"no file {match[1]}"
    if match := re.match(r"Path is not a file: '(.*)'", message):
        return f"{match[1]} is a folder, expected a YAML file"
    return " ".join(message.split())


def _expand(value: Any, name: str) -> Any:
    if isinstance(value, list):
        return [_expand(each, name) for each in value]
    return expanded(value, name) if isinstance(value, Path) else value


def _printable(text: str) -> str:
    """Escape what would break the line or move a terminal's cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object) -> str:
    """Return a plain value as a YAML file would have it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type_name(text: str) -> str:
    if match := re.match(r"typing\.Literal\[(.*)\]", text):
        return "one of " + ", ".join(part.strip().strip("'") for part in match[1].split(","))
    name = text.removeprefix("<class '").removesuffix("'>").split(".")[-1]
    return _TYPE_NAMES.get(name, text)


def _hint(name: str, known: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(near)}?" if (near := _near(name, known)) else "; see --help"


def _near(name: str, known: Sequence[str]) -> list[str]:
    """Return the few known names that a wrong one may stand for: another spelling, a part, or initials of one."""
    parts = _parts(name)
    spelt = {other: _likeness(parts, _parts(other)) for other in known}
    if spelt and max(spelt.values()) >= _LIKE:
        return [max(spelt, key=lambda other: spelt[other])]
    text = ".".join(parts)
    last = [other for other in known if _parts(other)[-1] == text]  # kind, of norm.kind
    initials = [other for other in known if len(text) > 1 and _initials(other) == text]
    begins = [other for other in known if len(text) > 1 and ".".join(_parts(other)).startswith(text)]
    return next((found for found in (last, initials, begins) if 0 < len(found) <= _MOST_HINTS), [])


_LIKE = 0.75
"""Share of letters that two spellings of one word have in common, in order; two letters swapped in four are this."""
_MOST_HINTS = 3


def _parts(name: str) -> list[str]:
    """Return ["fid", "batch_size"] of --fid.batch-size."""
    return name.lstrip("-").replace("-", "_").split(".")


def _initials(name: str) -> str:
    return "".join(word[:1] for word in re.split(r"[._]", ".".join(_parts(name))))


def _likeness(parts: list[str], others: list[str]) -> float:
    """Return how alike two names are, 0 to 1: as much as the part in which they are least so."""
    if len(parts) != len(others):
        return float("_".join(parts) == "_".join(others))
    pairs = zip(parts, others, strict=True)
    return min(difflib.SequenceMatcher(None, part, other).ratio() for part, other in pairs)


def _option_for(value: str, known: Sequence[str]) -> str:
    """Return a hint at the option that a value was probably meant for, which was given without any."""
    path = Path(value)
    for option in ("--run", "--runs"):
        if option in known:
            return f"; did you mean {option} {value}?"
    if path.suffix in (".yaml", ".yml"):
        return f"; did you mean --config {value}?"
    if "--resume" in known and len(path.parts) > 2:
        out = path.parent.parent
        place = "" if out == Path("runs") else f" --out {out}"
        return f"; did you mean --name {path.name} --resume{place}?"
    return "; see --help"


def _build(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Construct nested dataclasses; jsonargparse lets a null or a scalar in a group's place pass."""
    hints = typing.get_type_hints(cls)
    arguments = {}
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        name, value, hint = prefix + field.name, values[field.name], hints[field.name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                inner = ", ".join(f.name for f in dataclasses.fields(hint))
                raise UsageError(f"{name}: expected a group of settings ({inner}), got {shown(value)}")
            arguments[field.name] = _build(typing.cast(type, hint), value, f"{name}.")
        elif value is None and types.NoneType not in (hint, *typing.get_args(hint)):
            raise UsageError(f"{name}: expected {_type_name(str(hint))}, got null")
        else:
            arguments[field.name] = _expand(value, name)
    try:
        return cls(**arguments)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except RuntimeError as error:  # a configuration may build a layer to see whether it can be
        if "allocate" not in str(error):
            raise
        raise UsageError(f"{prefix.rstrip('.') or 'config'}: these sizes need more memory than there is") from None
