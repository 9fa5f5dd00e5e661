"""The command ``bncore``: what is installed, the demo and the benchmark.

A command's own module is imported when it is called, and no other.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

import bncore

COMMANDS = {
    "demo": ("bncore.demo", "train a deep network without and with batch normalization"),
    "bench": ("bncore.bench", "measure the speed, beside other libraries"),
}
"""Modules with ``add_arguments(parser)`` and ``main(args)``, and what they do."""


def main(argv=None):
    """Run a command.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; the process's where not given.

    Returns
    -------
    int
        Exit code: 0, or 2 where an optional package is missing.

    Examples
    --------
    >>> from bncore.cli import main
    >>> main([])  # doctest: +ELLIPSIS
    usage: bncore ...
    0
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parser_of(argv).parse_args(argv)
        return args.run(args) or 0
    except ImportError as error:
        if "pip install" not in str(error):
            raise
        print(f"bncore: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parser_of(argv):
    """The parser, with the arguments of the command that ``argv`` names.

    Parameters
    ----------
    argv : list of str

    Returns
    -------
    argparse.ArgumentParser
    """
    parser = argparse.ArgumentParser(prog="bncore", description=bncore.__doc__)
    parser.add_argument("--version", action="version", version=f"bncore {bncore.__version__}")
    parser.set_defaults(run=lambda args: parser.print_help())
    commands = parser.add_subparsers(title="commands", metavar="command")
    info = commands.add_parser("info", help="show versions, instruction sets and threads in use")
    info.set_defaults(run=lambda args: bncore.show_config())
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        if name in argv[:1]:
            module = import_module(module)
            module.add_arguments(command)
            command.set_defaults(run=module.main)
    return parser
