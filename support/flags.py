"""Command line flags made from the fields of a dataclass."""
import argparse
import dataclasses


def flag_of(name: str) -> str:
    """The flag of a field, such as --eval-batch for eval_batch."""
    return "--" + name.replace("_", "-")


def add_flags(parser, fields: list[dataclasses.Field], default: str = "") -> None:
    """Add a flag for each of the fields to a parser or to one of its argument groups.

    default: what the help text calls the default, in place of the field's.
    """
    for f in fields:
        meta = f.metadata
        value = default if f.default != "" and default else f.default
        text = f"{meta['help']} (default {value})" if value != "" else meta["help"]
        if f.type is bool:
            parser.add_argument(flag_of(f.name), action=argparse.BooleanOptionalAction, help=text)
        else:
            metavar = None if meta["choices"] else f.type.__name__.upper()
            parser.add_argument(flag_of(f.name), type=f.type, choices=meta["choices"], help=text,
                                metavar=metavar)


def wrong_types(fields: list[dataclasses.Field], values: dict) -> list[str]:
    """The names and values whose type is not that of their field; an int may stand for a float."""
    types = {f.name: f.type for f in fields}
    return [f"{name} {value!r}" for name, value in values.items() if type(value) is not types[name]
            and not (types[name] is float and type(value) is int)]
