# Everything of llama.cpp that the core calls, under one name: `from llama_crab.capi cimport lib`.
from llama_crab.capi.ggml cimport *
from llama_crab.capi.ggml_backend cimport *
from llama_crab.capi.llama cimport *
