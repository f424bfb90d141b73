"""``python -m nnssl COMMAND``: the same as ``nnssl_COMMAND``."""

from __future__ import annotations

import sys

from nnssl.cli import COMMANDS, run


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: python -m nnssl COMMAND [flags]\n")
        print("\n".join(f"  {name:<20} {text}" for name, text in COMMANDS.items()))
        return 0
    if sys.argv[1] not in COMMANDS:
        print(f"nnssl: unknown command {sys.argv[1]!r}; one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run(sys.argv[1], sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
