"""What plain (unquoted) scalars mean: the core schema of YAML 1.2.2, section 10.3.2. PyYAML's rules are those of 1.1."""

from __future__ import annotations

import re

MAX_DIGITS = 1000
NULL = re.compile(r"null|Null|NULL|~|")
TRUE = re.compile(r"true|True|TRUE")
FALSE = re.compile(r"false|False|FALSE")
DECIMAL = re.compile(r"[-+]?[0-9]+")
OCTAL = re.compile(r"0o[0-7]+")
HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
INFINITY = re.compile(r"[-+]?\.(inf|Inf|INF)")
NAN = re.compile(r"\.(nan|NaN|NAN)")


def resolve(text: str) -> str | int | float | bool | None:
    """The value of a plain scalar.

    Raises:
        ValueError: for a whole number of more than 1000 digits; Python cannot even print one of more than 4300.
    """
    if NULL.fullmatch(text):
        return None
    if TRUE.fullmatch(text) or FALSE.fullmatch(text):
        return text[0] in "tT"
    if any(pattern.fullmatch(text) for pattern in (DECIMAL, OCTAL, HEXADECIMAL)):
        if len(text) > MAX_DIGITS:
            raise ValueError(f"a number of {len(text)} digits")
        return int(text, 0 if text[1:2] in ("o", "x") else 10)  # a leading zero has no meaning: 0755 is 755
    if FLOAT.fullmatch(text):
        return float(text)
    if INFINITY.fullmatch(text) or NAN.fullmatch(text):
        return float(text.replace(".", ""))
    return text
