"""The model that a command is told to use."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnssl.inference.models import TrainedModel


def selected_model(parser: argparse.ArgumentParser, args: argparse.Namespace) -> TrainedModel:
    """The model folder after ``-m``, or the one that ``-d``, ``-tr``, ``-p`` and ``-c`` name; its name is printed."""
    if args.m is not None and (args.tr or args.p or args.c):
        parser.error("-m names the model; leave out -tr, -p and -c")

    from nnssl.inference.models import find_model, open_model

    if args.m is not None:
        model = open_model(args.m, folds=args.f, checkpoint=args.chk)
    else:
        model = find_model(
            args.d, trainer=args.tr, plans=args.p, configuration=args.c, folds=args.f, checkpoint=args.chk
        )
    print(f"Model: {model}")
    return model
