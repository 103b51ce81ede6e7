#include "jinja_checks_bridge.h"

#include <cstdint>
#include <stdexcept>

namespace llama_crab {

std::string & last_refusal() {
    thread_local std::string reason;
    return reason;
}

namespace {

[[noreturn]] void refuse(const std::string & reason) {
    last_refusal() = reason;
    throw std::runtime_error(reason);
}

// Looks through a value that is about to be kept, in `keeper` or a variable: what holds itself, or
// nests without end, could not be printed or given back.
struct Inspection {
    const void * keeper;
    size_t       n = 0;

    void look(const jinja::value & value, int depth = 0) {
        constexpr int    max_depth = 200;
        constexpr size_t max_n     = 1 << 20;
        if (value.get() == keeper) {
            refuse("a list or a mapping cannot hold itself");
        }
        if (depth > max_depth || ++n > max_n) {
            refuse("a list or a mapping is too large");
        }
        if (jinja::is_val<jinja::value_array>(value)) {
            for (const jinja::value & item : value->as_array()) {
                look(item, depth + 1);
            }
        } else if (jinja::is_val<jinja::value_object>(value)) {
            for (const auto & [key, item] : value->as_ordered_object()) {
                look(item, depth + 1);
            }
        }
    }
};

// Their arguments may be a number of blanks for each line.
bool is_padding(const std::string & name) { return name == "tojson" || name == "indent"; }

void check_padding(const jinja::value & argument) {
    constexpr int64_t  most = 100;
    const jinja::value value =
        jinja::is_val<jinja::value_kwarg>(argument)
            ? jinja::cast_val<jinja::value_kwarg>(argument)->val : argument;
    if (jinja::is_val<jinja::value_int>(value)
        && (value->as_int() > most || value->as_int() < -most)) {
        refuse("indent: more than " + std::to_string(most) + " blanks");
    }
}

struct CheckedCall : jinja::call_expression {
    explicit CheckedCall(call_expression & other)
        : call_expression(std::move(other.callee), std::move(other.args)) {
        pos = other.pos;
    }

    jinja::value execute_impl(jinja::context & ctx) const override {
        jinja::func_args values(ctx);
        for (const auto & arg : args) {
            values.push_back(arg->execute(ctx));
        }
        const jinja::value function = callee->execute(ctx);
        if (!jinja::is_val<jinja::value_func>(function)) {
            throw std::runtime_error("Callee is not a function: got " + function->type());
        }
        const auto * called = jinja::cast_val<jinja::value_func>(function);
        if (called->arg0 && called->name == "append" && values.count() > 0) {
            Inspection{called->arg0.get()}.look(values.get_args()[0]);
        }
        for (size_t i = 0; called->arg0 && is_padding(called->name) && i < values.count(); ++i) {
            check_padding(values.get_args()[i]);
        }
        return called->invoke(values);
    }
};

struct Padding : jinja::expression {
    explicit Padding(jinja::statement_ptr argument_) : argument(std::move(argument_)) {
        pos = argument->pos;
    }

    jinja::value execute_impl(jinja::context & ctx) const override {
        jinja::value value = argument->execute(ctx);
        check_padding(value);
        return value;
    }

    jinja::statement_ptr argument;
};

struct CheckedSet : jinja::set_statement {
    explicit CheckedSet(set_statement & other)
        : set_statement(std::move(other.assignee), std::move(other.val), std::move(other.body)) {
        pos = other.pos;
    }

    jinja::value execute_impl(jinja::context & ctx) const override {
        using namespace jinja;
        const auto * name   = dynamic_cast<identifier *>(assignee.get());
        const auto * member = dynamic_cast<member_expression *>(assignee.get());
        const auto * key    = member && !member->computed
                                  ? dynamic_cast<identifier *>(member->property.get()) : nullptr;
        if (!val || !(name || key)) {
            return set_statement::execute_impl(ctx);
        }
        const value given = val->execute(ctx);
        if (name) {
            Inspection{nullptr}.look(given);
            ctx.set_val(name->val, given);
            return mk_val<value_undefined>();
        }
        const value keeper = member->object->execute(ctx);
        if (!is_val<value_object>(keeper)) {
            throw std::runtime_error("Cannot assign to member of non-object");
        }
        Inspection{keeper.get()}.look(given);
        const_cast<value_object_t *>(cast_val<value_object>(keeper))->insert(key->val, given);
        return mk_val<value_undefined>();
    }
};

}  // namespace

jinja::statement_ptr checked(jinja::call_expression & call) {
    return std::make_unique<CheckedCall>(call);
}

jinja::statement_ptr checked(jinja::set_statement & set) {
    return std::make_unique<CheckedSet>(set);
}

void check_padding(jinja::statement_ptr & filter) {
    auto *       call = dynamic_cast<jinja::call_expression *>(filter.get());
    const auto * name = call ? dynamic_cast<jinja::identifier *>(call->callee.get()) : nullptr;
    if (name && is_padding(name->val)) {
        for (jinja::statement_ptr & argument : call->args) {
            argument = std::make_unique<Padding>(std::move(argument));
        }
    }
}

}  // namespace llama_crab
