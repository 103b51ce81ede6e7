# What is checked before llama.cpp could fail in a worse way, and the creation itself.

cdef int _refuse_larger_than_memory(
        Model model, lib.llama_context_params *c) except -1:
    # Linux grants allocations that it cannot back and kills the process later, so a KV cache that
    # exceeds the whole machine is refused first. Recurrent states and windowed caches are smaller
    # than this estimate; they are left to llama.cpp.
    if not hasattr(os, "sysconf") or model.is_recurrent or model.is_hybrid:
        return 0
    if (lib.llama_supports_gpu_offload() and c.offload_kqv) or (model.n_swa > 0 and not c.swa_full):
        return 0
    cdef dict metadata = model.metadata
    arch = metadata.get("general.architecture", "")
    head = model.n_embd // max(1, model.n_head)
    width = (int(metadata.get(f"{arch}.attention.key_length", head))
             + int(metadata.get(f"{arch}.attention.value_length", head)))
    # 4-bit types are the smallest that llama.cpp allows here.
    bits = 4 if c.type_k not in (_KV_TYPES["f32"], _KV_TYPES["f16"], _KV_TYPES["bf16"]) else 16
    n_ctx = c.n_ctx or model.n_ctx_train
    needed = n_ctx * model.n_layer * model.n_head_kv * width * bits // 8
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > total:
        raise errors.OutOfMemoryError(
            f"n_ctx={n_ctx} needs about {needed / 2**30:.1f} GiB for its KV cache, "
            f"the machine has {total / 2**30:.1f} GiB")
    return 0


cdef int _refuse_unfit_fields(lib.llama_context_params *c, int64_t n_ctx) except -1:
    # Both reach assertions or fail late.
    n_outputs_max = c.n_outputs_max or c.n_batch
    if not c.n_seq_max <= min(c.n_batch, n_ctx, n_outputs_max):
        raise errors.ContextCreateError(
            f"n_seq_max={c.n_seq_max} exceeds n_batch={c.n_batch}, n_ctx={n_ctx} "
            f"or n_outputs_max={n_outputs_max}")
    if c.type_v not in (_KV_TYPES["f32"], _KV_TYPES["f16"], _KV_TYPES["bf16"]) \
            and c.flash_attn_type == lib.LLAMA_FLASH_ATTN_TYPE_DISABLED:
        raise errors.ContextCreateError("a quantized type_v needs flash attention")
    return 0


cdef int _refuse_exports(nat.ContextHandle *handle) except -1:
    if handle.exports() > 0:
        raise BufferError(
            f"{handle.exports()} buffer(s) over logits or embeddings are alive; release them "
            "(`with ctx.logits() as row:`), copy them (`ctx.copy_logits(out=...)`), "
            "or sample in C")
    return 0


cdef int _create_context(
        Model model, lib.llama_context_params *c, nat.ContextPtr& out) except -1:
    cdef nat.Status status
    cdef uint64_t mark
    cdef nat.ContextPtr made
    if model.vocab_only or model.no_alloc:
        raise errors.ContextCreateError("the model was loaded without weights")
    _refuse_unfit_fields(c, c.n_ctx or model.n_ctx_train)
    _refuse_larger_than_memory(model, c)
    mark = nat.log_mark()
    with nogil:
        made = nat.create_context(model._c_model, c[0], status)
    if made == NULL:
        found = _error(errors.ContextCreateError, status, mark, _str(status.message))
        if any("allocate" in line or "out of memory" in line for line in found.log):
            found = errors.OutOfMemoryError(found.args[0], log=found.log)
        raise found
    out.swap(made)
    return 0
