// Calls and assignments of a template, made to refuse what llama-common's runtime would not survive.
#pragma once

#include <string>

#include "chat.h"
#include "jinja/runtime.h"

namespace llama_crab {

// Take what a node consists of, and behave like it; but no list or mapping gets into itself, or grows
// without bound, and no line is indented beyond reason.
jinja::statement_ptr checked(jinja::call_expression & call);
jinja::statement_ptr checked(jinja::set_statement & set);

// The same for the arguments of a filter.
void check_padding(jinja::statement_ptr & filter);

// Why a node of this thread refused something last; empty when none did since it was cleared.
// llama-common tries templates out and passes over what they throw.
std::string & last_refusal();

}  // namespace llama_crab
