"""Tools that a model can call: what they are, and calls for models that were not made for them.

A Python function or a mapping in OpenAI's form becomes a `Tool`. `ToolFallback` asks for calls,
constrains and reads them where the chat template knows no tools.
"""

from .fallback import ToolFallback
from .fallback_parser import FallbackParser
from .tool import Tool, function_tool, normalize_tool_choice, normalize_tools, tool_result_text

__all__ = [
    "FallbackParser",
    "Tool",
    "ToolFallback",
    "function_tool",
    "normalize_tool_choice",
    "normalize_tools",
    "tool_result_text",
]
