"""Options as fields of a dataclass: allowed values, their checks, words and command line.

    option, choice, number    make a field of `config.Config`
    check_value               any value, from JSON or a checkpoint, as one that the field allows
    show, as_argument         a value as people write it, and as it is given on the command line
    Parser, add_option        the command line
"""

import argparse
import dataclasses
import math
import typing

from files import UserError


def option(
    default, help: str, choices=None, low=None, high=None, count=None, was=None, before=None
):
    """A field of Config.

    choices, low, high: allowed values; of a tuple, of each of its values. count: how many values a
    tuple has. was: the field's name in older checkpoints and command lines. before: its value in
    runs that are older than the field or its default, if that is not the default.
    """
    allowed = dict(help=help, choices=choices, low=low, high=high, count=count, was=was)
    return dataclasses.field(default=default, metadata=allowed | dict(before=before))


def choice(choices: str, help: str, **more):
    """A field with a few allowed values; the first one is the default, and "-" is no value."""
    values = tuple("" if word == "-" else word for word in choices.split())
    return option(values[0], help, values, **more)


def number(default, low, high, help: str, **more):
    """A field, or a tuple's values, between low and high."""
    return option(default, help, low=low, high=high, **more)


def show(value) -> str:
    """A value as people write it."""
    if isinstance(value, tuple):
        return " ".join(map(show, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def as_argument(name: str, value) -> str:
    """An option as it is given on the command line."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    return f"--{option} {show(value)}".rstrip()  # an empty tuple has no words


def check_value(f: dataclasses.Field, value):
    """`value` as the field's type, if it is one of those allowed. Raises ValueError, saying why."""
    allowed: typing.Any = f.metadata
    if typing.get_origin(f.type) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"expected a list of numbers, got {value!r:.80}")
        if allowed["count"] not in (None, len(value)):
            raise ValueError(f"takes {allowed['count']} numbers, got {len(value)}")
        if allowed["choices"] and len(set(map(str, value))) < len(value):
            raise ValueError(f"names a value twice: {show(tuple(value)):.80}")
        numbers = tuple(_check_one(typing.get_args(f.type)[0], v, allowed) for v in value)
        if allowed["count"] == 2 and not numbers[0] < numbers[1]:  # a window
            raise ValueError(f"{show(numbers)}: the first number must be the smaller one")
        return numbers
    return _check_one(f.type, value, allowed)


def _check_one(kind, value, allowed):
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise ValueError(f"expected {names[kind]}, got {value!r:.80}")
    low, high, choices = allowed["low"], allowed["high"], allowed["choices"]
    if choices and value not in choices:
        names = ", ".join(str(c) for c in choices if c != "")
        raise ValueError(f"{value!r:.80}: use one of {names}")
    if low is not None and value < low:
        raise ValueError(f"{value!r:.80}: give {low:g} or more")
    if high is not None and value > high:
        raise ValueError(f"{value!r:.80}: give {high:g} or less")
    return value


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors: one line, like all others."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; see --help")


ALL_FOLDS = -1  # as a value of --fold


def fold_or_all(word: str) -> int:
    """A value of --fold."""
    return ALL_FOLDS if word == "all" else int(word)


def add_option(group, f: dataclasses.Field, help: str, kind=None) -> None:
    """Add a field to an argparse group. kind: what makes its value of a word, if not its type."""
    more: dict[str, typing.Any] = dict(default=argparse.SUPPRESS, dest=f.name)
    if f.type is bool:
        more |= dict(action=argparse.BooleanOptionalAction)
    elif typing.get_origin(f.type) is tuple:
        more |= dict(type=typing.get_args(f.type)[0], nargs="*", metavar="N")
    else:
        kinds = {int: "N", float: "X", str: "TEXT"}
        choices = [c for c in f.metadata["choices"] or () if c != ""]
        metavar = "{" + ",".join(choices) + "}" if choices else kinds[typing.cast(type, f.type)]
        more |= dict(type=f.type, metavar=metavar)
    if kind:
        more["type"] = kind
    group.add_argument(f"--{f.name.replace('_', '-')}", help=help.replace("%", "%%"), **more)
    if f.metadata["was"]:  # the older name keeps working
        old = f"--{f.metadata['was'].replace('_', '-')}"
        group.add_argument(old, help=argparse.SUPPRESS, **more)
