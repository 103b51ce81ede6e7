# distutils: language = c++
# cython: language_level=3, binding=True, embedsignature=False
# cython: boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The compiled core: handles of llama.cpp's objects, one class per C object.

Rules (docs/architecture.md says why):

1. `lib.*` is called here and nowhere else; no C pointer reaches Python.
2. No policy: no defaults of our own, no logging, no numpy.
3. `_require_open()` (or `_enter()`) is the first statement of every method.
4. What llama.cpp would assert is checked before the call; guarded calls (native/guard.h) are the
   second line.
5. The GIL is released around load, free, decode, encode, sample, tokenise and state.
6. A Context is used by one thread at a time: `_enter()` refuses the second.
"""
# The included parts use these, which a reader of this file alone cannot see.
from cpython.buffer cimport PyBUF_CONTIG_RO, PyBUF_FORMAT, PyBUF_ND, PyBUF_SIMPLE  # no-cython-lint
from cpython.buffer cimport PyBUF_STRIDED_RO, PyBUF_WRITABLE  # no-cython-lint
from cpython.buffer cimport PyBuffer_IsContiguous, PyBuffer_Release  # no-cython-lint
from cpython.buffer cimport PyObject_CheckBuffer, PyObject_GetBuffer  # no-cython-lint
from cpython.bytes cimport PyBytes_FromStringAndSize  # no-cython-lint
from cpython.exc cimport PyErr_CheckSignals  # no-cython-lint
from cpython.number cimport PyNumber_Index  # no-cython-lint
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t  # no-cython-lint
from libc.string cimport memcpy  # no-cython-lint
from libcpp cimport bool as cbool  # no-cython-lint
from libcpp.memory cimport shared_ptr  # no-cython-lint
from libcpp.string cimport string  # no-cython-lint
from libcpp.utility cimport move  # no-cython-lint
from libcpp.vector cimport vector  # no-cython-lint
from cython.operator cimport dereference as deref  # no-cython-lint
cimport cython  # no-cython-lint

from llama_crab.capi cimport draft_model as draft  # no-cython-lint
from llama_crab.capi cimport fit_bridge  # no-cython-lint
from llama_crab.capi cimport lib
from llama_crab.capi cimport nat

import atexit
import os

from llama_crab import errors  # no-cython-lint

include "handles/status.pxi"     # Status -> exception, fork check, buffers of token ids
include "handles/logsink.pxi"    # drain_log, set_log_level
include "handles/backend.pxi"    # devices, system_info, supports_*
include "handles/params.pxi"     # keyword arguments -> llama_model_params, llama_context_params
include "handles/model.pxi"      # Model
include "handles/vocab.pxi"      # Vocab
include "handles/tokenized_texts.pxi"  # TokenizedTexts
include "handles/batch.pxi"      # Batch
include "handles/outputs.pxi"    # Logits, Embeddings
include "handles/context_checks.pxi"  # memory needed, live exports
include "handles/context.pxi"    # Context
include "handles/fit.pxi"        # measure_memory, common_fit
include "handles/state.pxi"      # state of a context or of one sequence
include "handles/memory.pxi"     # Memory
include "handles/adapter.pxi"    # LoraAdapter
include "handles/row_sampling.pxi"  # rows in, tokens out, for both kinds of sampler
include "handles/sampler.pxi"    # Sampler
include "handles/fused.pxi"      # FusedSampler
include "handles/row_scratch.pxi"  # RowScratch: rows under a logits processor
include "handles/slot_memory.pxi"  # SuspendedSlot; bodies of Stepper.suspend, save, ...
include "handles/step_counters.pxi"  # LatencyHistogram, StepCounters
include "handles/slot_results.pxi"  # bodies of Stepper.news, tokens, logprobs, ...
include "handles/speculation.pxi"  # Speculation; bodies of Stepper.drafts, speculation, ...
include "handles/stepper.pxi"    # Stepper: one engine step without the GIL
include "handles/draft_model.pxi"  # DraftModel: drafts of a second model
include "handles/embedder.pxi"   # Embedder: packed batches of texts to rows of floats
include "handles/chat.pxi"       # ChatTemplates, ChatPrompt, ChatParser
include "handles/ngram.pxi"      # NgramIndex, NgramCache: drafts from what was written before

nat.log_install()
nat.install_abort_handler()
lib.llama_backend_init()
atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
