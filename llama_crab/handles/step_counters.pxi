@cython.final
cdef class LatencyHistogram:
    """Times in microseconds, counted in buckets at most 1/32 wide: its size never grows.

    Bucket b holds the times from ``(b - s * 32) << s`` up to ``1 << s`` more, where s is
    ``max(b // 32 - 1, 0)``.

    Thread-safety: one thread records, any thread reads.
    """

    def __cinit__(self):
        self._c_histogram = nat.make_latency_histogram()

    def record(self, int64_t us):
        """Count a time; negative ones count as 0."""
        self._c_histogram.get().record(us)

    def counts(self):
        """Return the count of each bucket as a list."""
        cdef size_t i
        return [self._c_histogram.get().count(i) for i in range(nat.LATENCY_BUCKETS)]


@cython.final
cdef class StepCounters:
    """What a `Stepper` has done since it was made; readable after its end, too.

    Thread-safety: any thread may read; what a batch in progress adds may be seen in part.
    """

    def __cinit__(self):
        self._c_counters = nat.make_step_counters()

    def read(self):
        """Return the counts and microseconds.

        ``(n_steps, n_decoded, n_prefilled, n_generated, decode_us, prefill_us, sample_us,
        n_drafted, n_draft_accepted, drafting_us, draft_saved_us)``: batches; tokens in them, and of
        these in prompts; tokens chosen, without those that end an answer; time inside
        ``llama_decode``, the part of it for prompts (a batch of both kinds is shared out by its
        tokens), and time spent on output rows; tokens drafted, and of these chosen; time spent on
        finding them; and what plain batches would have taken beyond those with drafts, negative
        when drafts lost.
        """
        cdef const nat.CStepCounters *c = self._c_counters.get()
        return (c.n_steps, c.n_decoded, c.n_prefilled, c.n_generated,
                c.decode_us, c.prefill_us, c.sample_us, c.n_drafted, c.n_draft_accepted,
                c.drafting_us, c.draft_saved_us)

    @property
    def first_token(self):
        """Times from submission to the first token."""
        return _share_histogram(self._c_counters.get().first_token)

    @property
    def inter_token(self):
        """Times between two tokens of a sequence, but for those that its reader was behind."""
        return _share_histogram(self._c_counters.get().inter_token)


cdef LatencyHistogram _share_histogram(shared_ptr[nat.CLatencyHistogram] histogram):
    cdef LatencyHistogram found = LatencyHistogram.__new__(LatencyHistogram)
    found._c_histogram = histogram
    return found
