"""
Options of a program: a dataclass whose values come from a TOML file and from --key=value.

A field is `option(default, help, low, high)`. --help prints them all; an unknown key, or a value
out of range, is refused in one sentence.
"""

import dataclasses
import difflib
import math
import sys
import tomllib
from pathlib import Path

from data.dataset import DataError, check_range


def option(default, help: str, low: float | None = None, high: float | None = None):
    """A field with its line of help and the range of its values."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high})


def parse(field: dataclasses.Field, text):
    """A value from the command line or a TOML file as the field's type. Raises DataError."""
    kind, low, high = field.type, field.metadata.get("low"), field.metadata.get("high")
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(text).lower()]
        value = kind(str(text))
        if kind is float and not math.isfinite(value):
            raise ValueError
    except (ValueError, KeyError):
        raise DataError(f"{field.name} = {text!r} is not a {kind.__name__}") from None
    check_range(f"{field.name} = {text}", value, low, high)
    return value


def load_config(argv: list[str], kind: type):
    """[FILE.toml] [--key=value ...] -> kind. Raises DataError; an unknown key gets the nearest."""
    fields, values = {f.name: f for f in dataclasses.fields(kind)}, {}
    if "--help" in argv or "-h" in argv:
        print(sys.modules[kind.__module__].__doc__.strip() + "\n\nOptions, --name=value:")
        for f in fields.values():
            print(f"  --{f.name:18s} {str(f.default):18s} {f.metadata.get('help', '')}")
        sys.exit()
    for argument in argv:
        if argument.startswith("--"):
            name, equals, text = argument[2:].partition("=")
            values[name] = text if equals else "true"
            continue
        try:
            values |= tomllib.loads(Path(argument).read_text())
        except OSError as error:
            raise DataError(f"cannot read config {argument} ({error.strerror})") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{argument} is not TOML: {error}") from None
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0)[0]
            raise DataError(f"there is no config key {name!r}; the nearest is {near!r}")
    return kind(**{name: parse(fields[name], value) for name, value in values.items()})


def run(entry, name: str) -> None:
    """Call a main with the command line; what the user can mend becomes one sentence, exit 1."""
    try:
        entry(sys.argv[1:])
    except (DataError, FloatingPointError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: stopped by Ctrl-C")
