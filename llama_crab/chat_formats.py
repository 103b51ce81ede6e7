"""Chat formats by name, for model files that have no template of their own, or a wrong one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from . import _core
from .params import ParameterError


class ChatFormat(NamedTuple):
    """A Jinja template, and the texts at which its answers end, where the model marks no end."""

    template: str
    stops: tuple[str, ...] = ()


# A system message goes in front of the first user's.
_SYSTEM_FIRST = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content %}"
)
_TO_USER = "{{ ns.system }}\n\n{% set ns.system = '' %}"


def _roles(end: str, reply: str = "<|assistant|>\n") -> str:
    """Return a format of ``<|role|>`` lines."""
    return (
        f"{{% for m in messages %}}<|{{{{ m.role }}}}|>\n{{{{ m.content }}}}{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{reply}{{% endif %}}"
    )


def _chatml(role_end: str, end: str) -> str:
    return (
        f"{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}{role_end}{{{{ m.content }}}}{end}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant"
        f"{role_end}{{% endif %}}"
    )


def _mistral(before: str, after: str, answer: str) -> str:
    """Return Mistral's format, with its blanks before, behind and of the answer."""
    return (
        f"{{{{ bos_token }}}}{_SYSTEM_FIRST}{{% elif m.role == 'user' %}}{before}"
        f"{{% if ns.system %}}{_TO_USER}{{% endif %}}{{{{ m.content }}}}{after}"
        f"{{% else %}}{answer}{{{{ m.content }}}}{{{{ eos_token }}}}{{% endif %}}{{% endfor %}}"
    )


def _mistral_v7(blank: str) -> str:
    return (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        f"[SYSTEM_PROMPT]{blank}{{{{ m.content }}}}[/SYSTEM_PROMPT]"
        f"{{% elif m.role == 'user' %}}[INST]{blank}{{{{ m.content }}}}[/INST]"
        f"{{% else %}}{blank}{{{{ m.content }}}}{{{{ eos_token }}}}{{% endif %}}{{% endfor %}}"
    )


def _vicuna(system: str, line_end: str) -> str:
    return (
        f"{{{{ bos_token }}}}{{% for m in messages %}}{{% if m.role == 'system' %}}{system}"
        f"{{% elif m.role == 'user' %}}USER: {{{{ m.content }}}}{line_end}"
        "{% else %}ASSISTANT: {{ m.content }}{{ eos_token }}"
        f"{line_end.strip(' ')}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


_CHATML = ChatFormat(_chatml("\n", "<|im_end|>\n"), ("<|im_end|>",))
_LLAMA_2 = ChatFormat(
    _SYSTEM_FIRST + "{% elif m.role == 'user' %}{{ bos_token }}[INST] "
    "{% if ns.system %}<<SYS>>\n{{ ns.system }}\n<</SYS>>\n\n{% endif %}"
    "{% set ns.system = '' %}"
    "{{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
_LLAMA_3 = ChatFormat(
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    ("<|eot_id|>",),
)
# What the makers of the models document. Names are llama-cpp-python's and llama.cpp's.
FORMATS: dict[str, ChatFormat] = {
    "chatml": _CHATML,
    "qwen": ChatFormat(_CHATML.template, ("<|im_end|>", "<|endoftext|>")),
    "chatml-function-calling": _CHATML,
    "llama-2": _LLAMA_2,
    "llama2": _LLAMA_2,
    "llama-3": _LLAMA_3,
    "llama3": _LLAMA_3,
    "mistral-instruct": ChatFormat(_mistral("[INST] ", " [/INST]", " "), ("</s>",)),
    "mistral-v1": ChatFormat(_mistral(" [INST] ", " [/INST]", " "), ("</s>",)),
    "mistral-v3": ChatFormat(_mistral("[INST] ", "[/INST]", " "), ("</s>",)),
    "mistral-v3-tekken": ChatFormat(_mistral("[INST]", "[/INST]", ""), ("</s>",)),
    "mistral-v7": ChatFormat(_mistral_v7(" "), ("</s>",)),
    "mistral-v7-tekken": ChatFormat(_mistral_v7(""), ("</s>",)),
    "gemma": ChatFormat(
        "{{ bos_token }}" + _SYSTEM_FIRST + "{% else %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{% if ns.system %}" + _TO_USER + "{% endif %}"
        "{{ m.content }}<end_of_turn>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<end_of_turn>",),
    ),
    "phi3": ChatFormat(_roles("<|end|>\n"), ("<|end|>",)),
    "phi4": ChatFormat(_chatml("<|im_sep|>", "<|im_end|>"), ("<|im_end|>",)),
    "falcon3": ChatFormat(_roles("\n"), ("<|endoftext|>",)),
    "zephyr": ChatFormat(_roles("{{ eos_token }}\n"), ("</s>",)),
    "vicuna": ChatFormat(_vicuna("{{ m.content }} ", " ")),
    "vicuna-orca": ChatFormat(_vicuna("SYSTEM: {{ m.content }}\n", "\n")),
    "alpaca": ChatFormat(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
        "{% elif m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
        "{% else %}### Response:\n{{ m.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
    "openchat": ChatFormat(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ m.content }}<|end_of_turn|>{% else %}GPT4 Correct "
        "{{ 'Assistant' if m.role == 'assistant' else 'User' }}: {{ m.content }}<|end_of_turn|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}GPT4 Correct Assistant:{% endif %}",
        ("<|end_of_turn|>",),
    ),
}


def chat_format(chat_template: str | os.PathLike[str] | None, model: _core.Model) -> ChatFormat:
    """Return what ``chat_template`` asks for; an empty template is the model's own.

    It is Jinja text, a file, the name of a further template in the model's GGUF, or a name
    in `FORMATS`. Raises `ParameterError`.
    """
    if chat_template is None:
        return ChatFormat("")
    if isinstance(chat_template, os.PathLike):
        return ChatFormat(_file_text(Path(chat_template)))
    if not isinstance(chat_template, str):
        raise ParameterError(f"chat_template: expected text or a path, not {chat_template!r}")
    if "{{" in chat_template or "{%" in chat_template or "\n" in chat_template:
        return ChatFormat(chat_template)
    named = model.metadata.get(f"tokenizer.chat_template.{chat_template}")
    if named is not None:
        return ChatFormat(str(named))
    if chat_template in FORMATS:
        return FORMATS[chat_template]
    if chat_template and len(chat_template) < 1024 and Path(chat_template).is_file():
        return ChatFormat(_file_text(Path(chat_template)))
    raise ParameterError(
        f"chat_template: {chat_template!r:.80} is no template text, no file, none of the "
        f"model's named templates and none of {', '.join(FORMATS)}"
    )


def _file_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ParameterError(f"chat_template: cannot read {path}: {error}") from error
