"""Commands. Each module parses its flags in ``main(argv)``, calls the library and prints; it holds no logic."""

from __future__ import annotations

import importlib
import os
import select
import sys
from collections.abc import Sequence

from nnssl.errors import UserError
from nnssl.guard import refuse_other_nnssl

COMMANDS = {
    "plan_and_preprocess": "fingerprint, plan and preprocess labeled and unlabeled cases",
    "train": "train one fold with one method",
    "predict": "segment a folder of scans, or single scans",
    "atlas_predict": "segment scans by registering labeled cases to them, without any training",
    "evaluate": "compare predictions with reference labels",
    "compare": "test whether the results of two or more runs differ",
    "report": "write runs, their results and pictures into one HTML file",
    "trainers": "list the available methods",
    "split": "make a label-budget data set from a fully labeled one",
    "export": "write a trained model so that stock nnU-Net predicts with it",
    "preview": "show what a method trains on, in pictures of your own data",
    "demo": "run the whole way on a phantom data set, or on your own folder",
}


def run(command: str, argv: Sequence[str] | None = None) -> int:
    """Runs ``nnssl_<command>`` and returns its exit code.

    0 done, 2 a mistake the user can mend, 130 interrupted, 141 what read the output (``| head``) is gone.
    """
    refuse_other_nnssl()
    # Read once, when torch is loaded: threads that wait by spinning take the cores from the augmentation workers,
    # which costs up to ten times the step where there are as many processes as cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    module = importlib.import_module(f"nnssl.cli.{command}")
    try:
        code = module.main(list(sys.argv[1:] if argv is None else argv)) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"nnssl_{command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"nnssl_{command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _output_is_gone():
            return 141
        from nnssl.utils.disk import told_system_error

        refusal = told_system_error(error)
        if refusal is None:
            raise
        print(f"nnssl_{command}: {refusal}", file=sys.stderr)
        return 2


def _output_is_gone() -> bool:
    """True if nothing reads the standard output any more; it is then led to nowhere, or its end would complain."""
    try:
        poll = select.poll()
        poll.register(sys.stdout, 0)
        gone = any(event & select.POLLERR for _, event in poll.poll(0))
        if gone:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # the standard output is no file
        return False
    return gone


def plan_and_preprocess() -> None:
    sys.exit(run("plan_and_preprocess"))


def train() -> None:
    sys.exit(run("train"))


def predict() -> None:
    sys.exit(run("predict"))


def atlas_predict() -> None:
    sys.exit(run("atlas_predict"))


def evaluate() -> None:
    sys.exit(run("evaluate"))


def compare() -> None:
    sys.exit(run("compare"))


def report() -> None:
    sys.exit(run("report"))


def trainers() -> None:
    sys.exit(run("trainers"))


def split() -> None:
    sys.exit(run("split"))


def export() -> None:
    sys.exit(run("export"))


def preview() -> None:
    sys.exit(run("preview"))


def demo() -> None:
    sys.exit(run("demo"))
