"""The one exception that nnssl raises for mistakes a user can mend."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in data, settings or flags, told in one message without a traceback.

    The message names what is wrong; the keyword arguments add, each on a line of its own, where it was seen (case or
    file), what was expected, what was found and what to do. Commands print it and exit with code 2.

    >>> print(UserError("image and label differ in shape", where="case_003", expected="(40, 56, 40)",
    ...                 found="(40, 56, 41)", fix="export the label again on the grid of the image"))
    image and label differ in shape
      where:    case_003
      expected: (40, 56, 40)
      found:    (40, 56, 41)
      to do:    export the label again on the grid of the image
    """

    def __init__(
        self,
        message: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ):
        self.message = message
        self.where = where
        self.expected = expected
        self.found = found
        self.fix = fix
        rows = (("where:", where), ("expected:", expected), ("found:", found), ("to do:", fix))
        super().__init__("\n".join([message, *(f"  {name:<9} {value}" for name, value in rows if value is not None)]))
