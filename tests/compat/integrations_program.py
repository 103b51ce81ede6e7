"""LangChain and LlamaIndex on our module, unchanged: run with a folder of packages and two models.

Prints one JSON object of what they answered.
"""

import json
import sys
import warnings

sys.path.append(sys.argv[1])
model, embedder = sys.argv[2:4]

from llama_crab.compat.llama_cpp import install_as_llama_cpp  # noqa: E402

install_as_llama_cpp()
warnings.simplefilter("ignore")  # theirs, about themselves

from langchain_community.chat_models import ChatLlamaCpp  # noqa: E402
from langchain_community.embeddings import LlamaCppEmbeddings  # noqa: E402
from langchain_community.llms import LlamaCpp  # noqa: E402
from llama_index.core.llms import ChatMessage  # noqa: E402
from llama_index.llms.llama_cpp import LlamaCPP  # noqa: E402
from pydantic import BaseModel, Field  # noqa: E402

PROMPT = "The capital of France is"
# LangChain's own defaults for RoPE are those of the first Llama; 0 is the model's.
options = {
    **{"model_path": model, "n_ctx": 1024, "n_batch": 64, "temperature": 0.0, "verbose": False},
    **{"rope_freq_base": 0, "rope_freq_scale": 0},
}
found = {}

llm = LlamaCpp(**options, max_tokens=8, repeat_penalty=1.0)
found["langchain text"] = llm.invoke(PROMPT)
found["langchain stream"] = list(llm.stream(PROMPT))
found["langchain stop"] = llm.invoke(PROMPT, stop=["."])
found["langchain tokens"] = llm.get_num_tokens(PROMPT)
whole = LlamaCpp(**options, max_tokens=8, streaming=False, grammar='root ::= "yes" | "no"')
found["langchain grammar"] = whole.invoke("Is it?")


class Place(BaseModel):
    """A place."""

    city: str = Field(max_length=20)
    population: int = Field(ge=0, le=10**8)


chat = ChatLlamaCpp(**options, max_tokens=64)
question = [("system", "You are helpful."), ("human", "What is the capital of France?")]
answer = chat.invoke(question)
found["langchain chat"] = answer.content
found["langchain chat reason"] = answer.response_metadata["finish_reason"]
found["langchain chat stream"] = [chunk.content for chunk in chat.stream(question)]
found["langchain structured"] = chat.with_structured_output(Place).invoke(question).model_dump()
named = {"type": "function", "function": {"name": "Place"}}
called = chat.bind_tools([Place], tool_choice=named).invoke(question)
found["langchain calls"] = [[call["name"], sorted(call["args"])] for call in called.tool_calls]
streamed = None
for chunk in chat.bind_tools([Place], tool_choice=named).stream(question):
    streamed = chunk if streamed is None else streamed + chunk
found["langchain streamed calls"] = [
    [call["name"], sorted(call["args"])] for call in streamed.tool_calls
]

vectors = LlamaCppEmbeddings(model_path=embedder, n_ctx=256, n_batch=256, verbose=False)
found["langchain vectors"] = [len(each) for each in vectors.embed_documents(["a", "b c"])]
found["langchain vector"] = len(vectors.embed_query("a"))

index = LlamaCPP(
    model_path=model,
    temperature=0.0,
    max_new_tokens=8,
    context_window=512,
    verbose=False,
    completion_to_prompt=str,
    messages_to_prompt=lambda messages: messages[-1].content,
)
found["llama-index text"] = index.complete(PROMPT).text
found["llama-index stream"] = [piece.delta for piece in index.stream_complete(PROMPT)]
found["llama-index chat"] = index.chat([ChatMessage(role="user", content=PROMPT)]).message.content
found["llama-index context"] = index.metadata.context_window
print(json.dumps(found))
