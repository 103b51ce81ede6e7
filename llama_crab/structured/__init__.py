"""Structured output: answers of which the form is guaranteed.

What is asked for (a type, a JSON schema, a pattern, texts to choose from) becomes a GBNF grammar,
and the answer is read back into an object.
"""

from .response_format import StructuredOutput, structured_output

__all__ = ["StructuredOutput", "structured_output"]
