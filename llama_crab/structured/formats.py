"""The formats of strings that can be generated, as patterns of whole texts.

Where a standard is wider than a pattern can be, it is a part of the standard: e-mail addresses
without quotes and comments, URIs with a host.
"""

from __future__ import annotations

from functools import cache

from .regex import Node, parse_regex

_MONTH_DAY = (
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
# Year 0 is none for Python.
_YEAR = r"(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP_YEAR = (
    r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])"
    r"|(?:0[48]|[2468][048]|[13579][26])00)"
)
_DATE = f"(?:{_YEAR}-{_MONTH_DAY}|{_LEAP_YEAR}-02-29)"
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
_OFFSET = r"(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_COUNT = r"[0-9]{1,6}"
_TIME_PART = f"T(?:{_COUNT}H(?:{_COUNT}M(?:{_COUNT}S)?)?|{_COUNT}M(?:{_COUNT}S)?|{_COUNT}S)"
_DATE_PART = f"(?:{_COUNT}Y(?:{_COUNT}M(?:{_COUNT}D)?)?|{_COUNT}M(?:{_COUNT}D)?|{_COUNT}D)"
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_GROUP = r"[0-9a-fA-F]{1,4}"
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,30}[a-zA-Z0-9])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL}){{0,3}}"
_DOMAIN = rf"(?:{_LABEL}\.){{1,3}}[a-zA-Z]{{2,12}}"
_URI_CHAR = r"(?:[a-zA-Z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"

PATTERNS = {
    "date": _DATE,
    "time": _CLOCK + _OFFSET,
    "date-time": f"{_DATE}T{_CLOCK}{_OFFSET}",
    "duration": f"P(?:{_DATE_PART}(?:{_TIME_PART})?|{_TIME_PART}|{_COUNT}W)",
    "uuid": r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "ipv6": "(?:"
    + "|".join(
        [
            rf"(?:{_GROUP}:){{7}}{_GROUP}",
            rf"(?:{_GROUP}:){{1,7}}:",
            *(
                rf"(?:{_GROUP}:){{1,{8 - n}}}(?::{_GROUP}){{{n - 1}}}"
                for n in range(2, 8)
            ),
            rf"::(?:{_GROUP}:){{0,6}}{_GROUP}",
            "::",
        ]
    )
    + ")",
    "hostname": _HOST,
    "email": rf"[a-zA-Z0-9_+-]{{1,32}}(?:\.[a-zA-Z0-9_+-]{{1,16}}){{0,2}}@{_DOMAIN}",
    "uri": rf"https?://{_DOMAIN}(?::[1-9][0-9]{{0,3}})?(?:/{_URI_CHAR}{{0,40}}){{0,8}}"
    rf"(?:\?(?:{_URI_CHAR}|[/?]){{0,80}})?(?:#(?:{_URI_CHAR}|[/?]){{0,60}})?",
}  # fmt: skip

# Of pydantic: they say what the text is for, and not which texts are allowed.
NO_RESTRICTION = frozenset({"password", "path", "file-path", "directory-path", "binary"})


@cache
def format_node(name: str) -> Node:
    """Return the pattern of a format of `PATTERNS`."""
    return parse_regex(PATTERNS[name], whole=True)
