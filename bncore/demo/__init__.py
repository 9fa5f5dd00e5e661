"""``bncore demo``: a deep network that is slow to train, and the same with batch normalization.

The article's experiment (Ioffe & Szegedy 2015, section 4.1) on scikit-learn's handwritten digits,
with layers of bncore and NumPy alone: ten hidden layers of sigmoids, trained without and with batch
normalization, each with the best learning rate of a sweep. Ends with a table and a picture.

This file owns the command: its arguments and its course. `data` loads the digits, `network` is the
network, `training` trains it, `table` and `figure` show what came out.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

NEEDS = ("matplotlib", "rich", "sklearn", "threadpoolctl", "tqdm")
"""Packages of the extra ``demo``, imported where they are used."""


def add_arguments(parser):
    """Add the command's arguments.

    Parameters
    ----------
    parser : argparse.ArgumentParser
    """
    parser.add_argument(
        "--out", type=png_path, default=Path("bncore-demo.png"), metavar="FILE",
        help="where to write the picture (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--activation", choices=("sigmoid", "tanh"), default="sigmoid",
        help="of the hidden layers (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--layers", type=positive_int, default=10, metavar="N",
        help="hidden layers (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true",
        help="a few seconds instead of a minute or two: fewer steps, learning rates and seeds",
    )  # fmt: skip


def main(args):
    """Run the command.

    Parameters
    ----------
    args : argparse.Namespace
        With the attributes of `add_arguments`.

    Returns
    -------
    int
        Exit code.

    Raises
    ------
    ImportError
        Where a package of the extra is missing.
    """
    for name in NEEDS:
        if find_spec(name) is None:
            raise ImportError(f'bncore demo needs {name}: pip install "bncore[demo]"', name=name)
    from tqdm import tqdm

    from bncore.demo import data, figure, table, training

    settings = training.Settings(activation=args.activation, hidden_layers=args.layers)
    if args.quick:
        settings = replace(settings, steps=500, learning_rates=(0.1, 0.2), seeds=(0,))
    digits = data.load_digits()
    start = perf_counter()
    with tqdm(total=2 * settings.total_steps(), unit="step", unit_scale=True) as bar:
        chosen = []
        for batch_norm in (False, True):
            runs = training.sweep(digits, settings, batch_norm=batch_norm, bar=bar)
            chosen.append(runs[training.best(runs)])
    table.show(*chosen, settings)
    figure.draw(*chosen, settings, args.out)
    print(f"Picture: {args.out}. All runs took {perf_counter() - start:.0f} s.")
    return 0


def png_path(text):
    """A file that can be written, for argparse."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png, got {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    return path


def positive_int(text):
    """A number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)
