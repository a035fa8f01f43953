"""Configuration: dataclass defaults, then YAML files, then flags; the later one wins.

jsonargparse reads files and flags and checks types; this module makes each of its complaints one line, which names the
file, and for a misspelt name the nearest one, and builds the (frozen, nested) dataclasses.
"""

import argparse
import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings

from common.runtime.errors import UsageError
from common.runtime.fields import names_of
from common.runtime.paths import expanded
from common.runtime.plugins import load_plugins

T = TypeVar("T")

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a field's text is its --help

_MISFIT = "config: a YAML tag, such as !!bool, does not fit the value after it; leave the tag out"
_read_yaml = get_loader("yaml")


def _read_any_yaml(text: str) -> Any:
    """Read YAML; PyYAML fails on a tag that does not fit its value, such as !!timestamp x, in whatever way it does."""
    try:
        return _read_yaml(text)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise yaml.YAMLError(f"a tag does not fit its value: {error}") from None


set_loader("yaml", _read_any_yaml, exceptions=(yaml.YAMLError,))


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
    values = read(cls, argv, prog=prog)
    if isinstance(plugins := values.get("plugins"), list):
        load_plugins(plugins)
    return _build(cls, values)


def read(cls: type, argv: Sequence[str] | None = None, *, prog: str | None = None) -> dict[str, Any]:
    """Return the nested plain values that ``parse`` builds a configuration from, each of its field's type.

    Raises:
        UsageError, SystemExit: as ``parse``, but for what only the whole configuration can refuse.
    """
    given = _with_own_files(sys.argv[1:] if argv is None else argv, cls.__module__.partition(".")[0])
    if {"-h", "--help"} & set(given) and any(field.name == "plugins" for field in dataclasses.fields(cls)):
        load_plugins(_plugins_in(given))  # so that the help lists what they add
    parser = _parser(cls, prog)
    try:
        return parser.parse_args(given).as_dict()
    except RecursionError:
        raise UsageError("config: a YAML file refers to itself; expected plain values") from None
    except (AttributeError, IndexError):  # of flags, jsonargparse reads some without the loader above
        raise UsageError(_MISFIT) from None


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


def configurations(application: str) -> dict[str, Path]:
    """Return an imported package's own configurations by name: the files of configs/APPLICATION, linked into it."""
    package = sys.modules.get(application)
    if package is None or not hasattr(package, "__path__"):
        return {}
    return {path.stem: path for path in sorted(Path(str(files(package) / "configs")).glob("*.yaml"))}


def _with_own_files(argv: Sequence[str], application: str) -> list[str]:
    """Replace each ``--config NAME`` that is no file by the application's own configuration of that name."""
    found, own = list(argv), configurations(application)
    for i, argument in enumerate(argv):
        if argument.startswith("--config="):
            found[i] = f"--config={_file(argument.removeprefix('--config='), application, own)}"
        elif argument == "--config" and i + 1 < len(argv):
            found[i + 1] = _file(argv[i + 1], application, own)
    return found


def _file(given: str, application: str, own: dict[str, Path]) -> str:
    path = expanded(given, "config")
    if not own or path.is_file():
        return given
    if given in own:
        return str(own[given])
    if not path.exists():
        near = difflib.get_close_matches(path.stem, own, n=1)
        hint = f"; did you mean --config {near[0]}?" if near else ""
        raise UsageError(f"config: no file {given}; by name {application} has {', '.join(own)}{hint}")
    return given


def _parser(cls: type, prog: str | None) -> "_Parser":
    parser = _Parser(prog=prog, description=cls.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--config",
        action="config",
        help="a YAML file, or one of the command's own by its name; may be given again, the later wins",
    )
    parser.add_class_arguments(cls)
    names = names_of(cls)
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
        line = _MISFIT if type(ex) is KeyError else " ".join(message.split())
        if match := re.match(r"unrecognized arguments: ([^ =]+)", line):
            line = f"{match[1]}: no such option{_hint(match[1], self._names())}"
        line = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", line)  # int
        line = re.sub(r'Parser key "([^"]+)"', r"\1", line)
        raise UsageError(f"config: {self._file}: {line}" if self._file else line) from None

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Namespace:
        before, self._file = self._file, cfg_path
        try:
            values = _read_any_yaml(Path(cfg_path).read_text(encoding="utf-8"))
            if not isinstance(values, Mapping):
                self.error(f"expected settings as 'name: value' lines, got {shown(values)}")
            self._refuse_unknown(values)
            return super().parse_path(cfg_path, *args, **kwargs)
        except UsageError:
            raise
        except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError, TypeError, ValueError) as error:
            self.error(f"cannot be read as YAML settings ({error})", error)
        finally:
            self._file = before

    def _refuse_unknown(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """Refuse misspelt names; jsonargparse names no file, and drops a group that is empty without a word."""
        known = self._names()
        for key, value in values.items():
            name = f"{prefix}{key}"
            if f"--{name}" not in known:
                self.error(f"{name}: no such setting{_hint(f'--{name}', known)}")
            if isinstance(value, Mapping):
                self._refuse_unknown(value, f"{name}.")

    def _names(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings if option.startswith("--")]


def _expand(value: Any, name: str) -> Any:
    if isinstance(value, list):
        return [_expand(each, name) for each in value]
    return expanded(value, name) if isinstance(value, Path) else value


def shown(value: object) -> str:
    """Return a plain value as a YAML file would have it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _hint(name: str, known: Sequence[str]) -> str:
    """Suggest the known name that is spelt alike, or the few that a wrong one is a word of."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if not near:
        word = re.compile(rf"\b{re.escape(name.lstrip('-'))}\b")
        near = [other for other in known if word.search(other.replace("_", "-"))]
    return f"; did you mean {' or '.join(near)}?" if 0 < len(near) <= 3 else "; see --help"


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
        elif isinstance(value, Mapping) or (value is None and types.NoneType not in (hint, *typing.get_args(hint))):
            expected = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else hint
            raise UsageError(f"{name}: expected {expected}, got {shown(value)}")
        else:
            arguments[field.name] = _expand(value, name)
    try:
        return cls(**arguments)
    except ValueError as error:
        raise UsageError(str(error)) from None
