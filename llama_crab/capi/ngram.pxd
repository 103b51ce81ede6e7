from libcpp.memory cimport shared_ptr
cdef extern from "native/ngram_cache.h" namespace "llama_crab" nogil:
    cppclass CNgramCache "llama_crab::NgramCache":
        pass
    ctypedef shared_ptr[CNgramCache] NgramCachePtr
