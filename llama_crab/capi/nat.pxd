# All of our own C++ that the core uses, under one name: `from llama_crab.capi cimport nat`.
from llama_crab.capi.native cimport *
from llama_crab.capi.ngram cimport *
from llama_crab.capi.stepper cimport *
