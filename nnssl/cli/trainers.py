"""``nnssl_trainers``: which methods there are, what each needs and can do."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="nnssl_trainers", description="List the available methods.")
    parser.add_argument("trainer", nargs="?", help="show one method in full, with its hyper-parameters")
    arguments = parser.parse_args(argv)

    from nnssl.trainers.engine.catalog import describe, table

    print(describe(arguments.trainer) if arguments.trainer else table())
