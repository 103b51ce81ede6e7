# The map of the compiled core: every class, the C object behind it, who frees it, what it keeps
# alive.
#
#   Model ──── Vocab                 one llama_model, shared by counted owners (native/handles.h)
#     ├─────── Context ──┬─ Memory   one llama_context; a share of the model
#     │                  ├─ Logits, Embeddings    views; a share of the context + one export each
#     │                  ├─ Stepper  the engine's step; a share of the context
#     │                  ├─ DraftModel drafts for it; a share of the context, and one of its own
#     │                  └─ Embedder texts to vectors; a share of the context
#     ├─────── LoraAdapter           one llama_adapter_lora; a share of the model
#     ├─────── ChatTemplates         parsed chat templates; a share of the model
#     ├─────── Sampler               one llama_sampler; a chain owns its stages
#     └─────── FusedSampler          our executor of a sampler chain; a share of the model
#   StepCounters, LatencyHistogram   what a Stepper has counted; stand alone, also after its end
#   Batch                            one llama_batch; stands alone
#   TokenizedTexts                   token ids of many texts; stands alone
#   NgramIndex, NgramCache           n-grams of one sequence, of past answers; stand alone
#   ChatPrompt ─── ChatParser        a rendered conversation, and the parser of its answer; no model
#
# The C objects are shared_ptr-owned, so no order of dropping Python objects, and no order in which
# the collector breaks a cycle, can free a model before its context.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp.memory cimport shared_ptr, unique_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from llama_crab.capi cimport draft_model as draft
from llama_crab.capi cimport lib
from llama_crab.capi cimport nat


cdef class Model:
    cdef nat.ModelPtr _c_model          # this object's share; null after close()
    cdef int _generation                # fork generation it was made in
    cdef readonly object path           # str, or tuple of str for splits
    cdef readonly bint vocab_only       # no weights were loaded: no Context can use it
    cdef readonly bint no_alloc         # sizes only: no Context can use it
    cdef readonly bint load_mtp         # with its MTP layers, where it has some
    cdef Vocab _vocab                   # made on first use

    cdef lib.llama_model *_require_open(self) except NULL


cdef class Vocab:
    cdef nat.ModelPtr _c_model          # the share that keeps the borrowed vocab alive
    cdef const lib.llama_vocab *_c_vocab
    cdef Model _model                   # for repr and `model`
    cdef readonly int32_t n_tokens

    cdef int _require_open(self) except -1
    cdef int _require_token(self, int64_t token) except -1


cdef class Context:
    cdef nat.ContextPtr _c_ctx          # this object's share; null after close()
    cdef Model _model                   # strong: ctx.model must work
    cdef Memory _memory                 # made on first use
    cdef int _embeddings                # llama_set_embeddings as last told
    cdef int _n_seq_max
    cdef bint _kv_unified

    cdef nat.ContextHandle *_require_open(self) except NULL
    cdef nat.ContextHandle *_enter(self, bint writes) except NULL
    cdef object _run(self, Batch batch, bint encode)
    cdef int _require_seq(self, int64_t seq_id) except -1


cdef class Memory:
    cdef Context _context               # strong: the llama_memory_t is borrowed from it

    cdef Context _require_context(self)
    cdef lib.llama_memory_t _enter(self, nat.ContextHandle **handle) except NULL


cdef class Batch:
    cdef lib.llama_batch _c_batch       # owned
    cdef readonly int32_t capacity      # tokens
    cdef readonly int32_t n_seq_max     # sequence ids per token
    cdef readonly int32_t n_embd        # 0: token ids; else floats per row
    cdef bint _open

    cdef int _require_open(self) except -1
    cdef int _require_room(self, int64_t n) except -1


cdef class Sampler:
    cdef lib.llama_sampler *_c_sampler  # freed here if _owned
    cdef int _generation
    cdef bint _owned                    # false: a chain frees it (_parent may be gone by then)
    cdef vector[nat.ModelPtr] _c_models  # shares, for stages that read a vocab
    cdef Sampler _parent                # strong: the chain that owns this stage
    cdef list _stages                   # strong: Python faces of a chain's stages; None if no chain
    cdef nat.ReferenceSampler _c_chain  # the same as a RowSampler, with its reused candidate buffer
    cdef nat.LogitsRow _c_row           # reused by rows that the caller brings
    cdef vector[float] _data            # copy of such a row

    cdef lib.llama_sampler *_require_open(self) except NULL


cdef class FusedSampler:
    cdef nat.FusedSampler *_c_sampler   # owned; holds a share of the model
    cdef int _generation
    cdef Model _model
    cdef readonly tuple stages          # (name, params) of each stage
    cdef nat.LogitsRow _c_row           # reused by rows that the caller brings
    cdef vector[float] _data            # copy of such a row

    cdef nat.FusedSampler *_require_open(self) except NULL


cdef class RowScratch:
    cdef vector[float] _data            # owned: it lives as long as a buffer over it does
    cdef Py_ssize_t _shape[2]
    cdef Py_ssize_t _strides[2]
    cdef int _exports


cdef class LoraAdapter:
    cdef object __weakref__
    cdef nat.AdapterPtr _c_adapter      # this object's share
    cdef Model _model
    cdef readonly str path

    cdef lib.llama_adapter_lora *_require_open(self) except NULL


cdef class _FloatView:
    cdef nat.ContextPtr _c_ctx          # share: the memory outlives Context.close() by design
    cdef Context _context
    cdef const float *_data             # borrowed until the next decode
    cdef Py_ssize_t _n
    cdef long _epoch                    # decode count when it was taken
    cdef int _exports                   # buffers handed out by this view
    cdef Py_ssize_t _shape[1]
    cdef Py_ssize_t _strides[1]
    cdef list _entered                  # memoryviews of nested `with` blocks


cdef class Logits(_FloatView):
    pass


cdef class Embeddings(_FloatView):
    pass


cdef class SuspendedSlot:
    cdef unique_ptr[nat.Slot] _c_slot   # owned until it is resumed
    cdef object _sampler                # strong: the slot borrows it


cdef class LatencyHistogram:
    cdef shared_ptr[nat.CLatencyHistogram] _c_histogram


cdef class StepCounters:
    cdef shared_ptr[nat.CStepCounters] _c_counters  # a Stepper's, or zeros


cdef class Speculation:
    cdef nat.Speculation _c_speculation  # holds a share of the n-gram cache


cdef class DraftControl:
    cdef nat.DraftControl *_c_control   # owned
    cdef vector[nat.DraftAcceptance] _c_acceptance  # by slot

    cdef int _require_slot(self, int slot) except -1


cdef class Stepper:
    cdef nat.CStepper *_c_stepper       # owned; holds a share of the context
    cdef Context _context               # strong
    cdef StepCounters _counters
    cdef list _samplers                 # strong: one Sampler or FusedSampler per slot, or None
    cdef RowScratch _scratch            # rows under a logits processor; replaced if a view was kept
    cdef bint _pause                    # another thread wants its turn

    cdef nat.CStepper *_require_open(self) except NULL
    cdef int _require_slot(self, int i) except -1
    cdef int _process(self, object process) except -1


cdef class DraftModel:
    cdef draft.DraftSourcePtr _c_source  # this object's share; it has shares of both contexts
    cdef Context _target                # strong
    cdef Model _model                   # strong: the one that drafts; the target's for its heads
    cdef readonly str kind
    cdef long _epoch                    # of the target when this was made

    cdef draft.DraftSource *_require_open(self) except NULL


cdef class TokenizedTexts:
    cdef nat.TokenLists _c_texts        # owned

    cdef const vector[int32_t] *_require_text(self, int64_t i) except NULL


cdef class _LentRows:
    cdef Py_buffer _view                # pinned while this object lives
    cdef bint _pinned
    cdef object _owner                  # strong: what was lent, to know it again


cdef class Embedder:
    cdef nat.CEmbedder *_c_embedder     # owned; holds a share of the context
    cdef Context _context               # strong
    cdef list _outs                     # strong: _LentRows that the queued texts are written to

    cdef nat.CEmbedder *_require_open(self) except NULL
    cdef int _require_text(self, const vector[int32_t]& ids, int64_t i) except -1
    cdef float *_rows(self, object out, int64_t row, int64_t n, int32_t *n_dims) except NULL


cdef class ChatTemplates:
    cdef unique_ptr[nat.CChatTemplates] _c_templates  # owned; holds a share of the model
    cdef int _generation
    cdef Model _model                   # for repr and `model`
    cdef bint _has_tokenizer

    cdef nat.CChatTemplates *_require_open(self) except NULL


cdef class ChatPrompt:
    cdef nat.CChatPrompt _c_prompt      # owned; immutable
    cdef bint _made                     # false: made by __new__ alone

    cdef const nat.CChatPrompt *_require_open(self) except NULL


cdef class ChatParser:
    cdef unique_ptr[nat.CChatParser] _c_parser  # owned; shares the compiled format

    cdef nat.CChatParser *_require_open(self) except NULL


cdef class NgramIndex:
    cdef nat.CNgramIndex *_c_index    # owned


cdef class NgramCache:
    cdef nat.NgramCachePtr _c_cache   # shared with the steppers that learn and draft
    cdef int _generation

    cdef nat.CNgramCache *_require_open(self) except NULL
