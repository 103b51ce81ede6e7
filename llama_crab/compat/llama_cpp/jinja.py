"""Chat templates rendered without a model, by the jinja2 package."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NoReturn

from ...errors import ChatTemplateError


def render(template: str, variables: Mapping[str, Any]) -> str:
    """Return the text of a template, set up as transformers sets it up, in a sandbox.

    Raises ImportError without jinja2; `ChatTemplateError`, and ValueError for what the template
    itself refuses.
    """
    from jinja2 import TemplateError

    try:
        return str(_parsed(template).render(**variables))
    except TemplateError as error:
        raise ChatTemplateError(str(error)) from None


@lru_cache(maxsize=16)
def _parsed(template: str) -> Any:
    try:
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ImportError(
            "rendering without a model needs jinja2: pip install jinja2; "
            "to_chat_handler() works without it"
        ) from None

    class Generation(Extension):
        """What stands between the marks of an answer, which only training looks at."""

        tags = {"generation"}  # noqa: RUF012  jinja2's own form

        def parse(self, parser: Any) -> Any:
            """Return what is inside."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": time.strftime}
    return environment.from_string(template)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # jinja2's own escapes what HTML would read.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
