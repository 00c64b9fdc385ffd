"""`python -m bench`: typer where it is installed, argparse where it is not; both read the commands' signatures."""

import argparse
import inspect
from collections.abc import Callable
from typing import Annotated, get_args, get_origin, get_type_hints

from bench.commands import report, run, targets

COMMANDS = (run, report, targets)


def options(command: Callable) -> dict[str, tuple[type, str, object]]:
    """{option: (type, help, default)} of a command."""
    hints = get_type_hints(command, include_extras=True)
    defaults = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    return {name: (*get_args(hints[name]), default) for name, default in defaults.items()}


def main() -> None:
    try:
        import typer
    except ImportError:
        main_with_argparse()
        return
    app = typer.Typer(help=__doc__, add_completion=False, no_args_is_help=True)
    for command in COMMANDS:
        for name, (kind, text, _) in options(command).items():
            command.__annotations__[name] = Annotated[kind, typer.Option(help=text)]
        app.command()(command)
    app()


def main_with_argparse() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench")
    subparsers = parser.add_subparsers(required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.__name__, help=command.__doc__, description=command.__doc__)
        subparser.set_defaults(command=command)
        for name, option in options(command).items():
            add_option(subparser, f"--{name}", *option)
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    given.pop("command")(**given)


def add_option(parser: argparse.ArgumentParser, flag: str, kind: type, text: str, default: object) -> None:
    text = f"{text} (default: {default})"
    if get_origin(kind) is list:
        parser.add_argument(flag, type=get_args(kind)[0], action="append", help=text)
    elif kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    else:
        parser.add_argument(flag, type=kind, help=text)


if __name__ == "__main__":
    main()
