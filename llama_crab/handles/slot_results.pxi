# What a Stepper's slots have given; the bodies of some of its methods.

cdef const nat.Slot *_slot_of(Stepper stepper, int i) except NULL:
    cdef nat.CStepper *c = stepper._require_open()
    stepper._require_slot(i)
    return &c.slot(i)


cdef list _slot_tokens(Stepper stepper, int i, size_t start):
    cdef const nat.Slot *slot = _slot_of(stepper, i)
    cdef size_t j
    return [slot.tokens[j] for j in range(start, slot.tokens.size())]


cdef tuple _slot_news(Stepper stepper, int i, Py_ssize_t n_bytes, size_t n_tokens):
    cdef const nat.Slot *slot = _slot_of(stepper, i)
    cdef size_t j
    cdef size_t n = slot.text_ends.size()
    cdef Py_ssize_t size = max(0, <Py_ssize_t> slot.text.size() - n_bytes)
    return (
        PyBytes_FromStringAndSize(slot.text.data() + slot.text.size() - size, size),
        [slot.tokens[slot.n_prompt + j] for j in range(n_tokens, n)],
        [slot.text_ends[j] for j in range(n_tokens, n)],
        _FINISH_NAMES[<int> slot.finish],
    )


cdef list _slot_logprobs(Stepper stepper, int i, size_t start):
    cdef const nat.Slot *slot = _slot_of(stepper, i)
    cdef size_t j
    return [(slot.logprobs[j].logprob, slot.logprobs[j].top)
            for j in range(start, slot.logprobs.size())]


cdef list _slot_prompt_logprobs(Stepper stepper, int i):
    cdef const nat.Slot *slot = _slot_of(stepper, i)
    cdef size_t j
    return [(slot.prompt_logprobs[j].logprob, slot.prompt_logprobs[j].top)
            for j in range(slot.prompt_logprobs.size())]


cdef tuple _slot_times(Stepper stepper, int i):
    cdef const nat.Slot *slot = _slot_of(stepper, i)
    return slot.start_us, slot.first_us, slot.last_us, slot.sample_us
