# native/ngram_index.h, native/ngram_cache.h: drafts from what has been written before.
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint64_t
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from llama_crab.capi.native cimport Status

cdef extern from "native/ngram_index.h" namespace "llama_crab" nogil:
    cppclass CNgramIndex "llama_crab::NgramIndex":
        CNgramIndex(int32_t min_ngram, int32_t max_ngram) except +
        void extend(const vector[int32_t]& tokens) except +
        int32_t draft(
            const vector[int32_t]& tokens, int32_t n_max, vector[int32_t]& out) except +
        size_t size()
        size_t n_bytes()
    int32_t MAX_ORDER "llama_crab::NgramIndex::max_order"
    vector[double] time_ngram_index(
        CNgramIndex& index, const vector[int32_t]& tokens, int32_t n_max,
        size_t evict_bytes) except +

cdef extern from "native/ngram_cache.h" namespace "llama_crab" nogil:
    cppclass CNgramCache "llama_crab::NgramCache":
        void learn(const vector[int32_t]& tokens, size_t begin, size_t end) except +
        int32_t draft(
            const vector[int32_t]& tokens, int32_t n_max, vector[int32_t]& out) except +
        void save(const string& path, uint64_t key, Status& status)
        void load(const string& path, uint64_t key, int32_t n_vocab, Status& status)
        size_t capacity()
        size_t size() except +
    int64_t MAX_CAPACITY "llama_crab::NgramCache::max_capacity"
    ctypedef shared_ptr[CNgramCache] NgramCachePtr
    NgramCachePtr make_ngram_cache "std::make_shared<llama_crab::NgramCache>"(
        size_t capacity) except +
