# llama.cpp's log: kept in C (native/logsink.h), drained on request.

def set_log_level(int level):
    """Set the lowest ``ggml_log_level`` that is kept: 1 debug, 2 info, 3 warning, 4 error.

    Wraps ``llama_log_set`` (the process-wide sink is installed at import).
    """
    nat.log_set_level(level)


def log_pending():
    """Return True when `drain_log` has lines to give."""
    return nat.log_pending()


def drain_log():
    """Return the waiting log lines as ``[(level, text), ...]``, oldest first, and forget them."""
    cdef vector[nat.LogLine] lines = nat.log_drain()
    cdef size_t i
    return [(lines[i].level, _str(lines[i].text)) for i in range(lines.size())]
