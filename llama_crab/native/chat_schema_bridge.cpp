#include "chat_schema_bridge.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstring>
#include <set>
#include <stdexcept>

namespace llama_crab {

namespace {

bool has(const common_json & schema, const char * key) { return schema.contains(key); }

bool is_text(const common_json & schema, const char * key) {
    return has(schema, key) && schema.at(key).is_string();
}

std::string text(const common_json & schema, const char * key) {
    return is_text(schema, key) ? schema.at(key).get<std::string>() : std::string();
}

bool is_list(const common_json & schema, const char * key) {
    return has(schema, key) && schema.at(key).is_array();
}

bool any_of(const common_json & schema, std::initializer_list<const char *> keys) {
    return std::any_of(keys.begin(), keys.end(),
                       [&](const char * key) { return has(schema, key); });
}

bool is_one_of(char c, const char * set) { return c != 0 && std::strchr(set, c) != nullptr; }

// The length of an escape that GBNF knows as well; 0 for any other.
size_t escape_length(const std::string & pattern, size_t at) {
    if (at + 1 >= pattern.size()) {
        return 0;
    }
    const char   c     = pattern[at + 1];
    const size_t n_hex = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
    if (n_hex == 0) {
        return is_one_of(c, "trn\\\"[]-") ? 2 : 0;
    }
    for (size_t i = at + 2; i < at + 2 + n_hex; ++i) {
        if (i >= pattern.size() || !std::isxdigit((unsigned char) pattern[i])) {
            return 0;
        }
    }
    return 2 + n_hex;
}

// "3}", "3,}", "3,5}" and ",5}", as far as an int goes.
bool is_count(const std::string & pattern, size_t & at) {
    size_t n_digits = 0;
    bool   comma    = false;
    bool   any      = false;
    for (; at < pattern.size() && pattern[at] != '}'; ++at) {
        if (pattern[at] == ',' && !comma) {
            comma    = true;
            n_digits = 0;
        } else if (!std::isdigit((unsigned char) pattern[at]) || ++n_digits > 9) {
            return false;
        } else {
            any = true;
        }
    }
    return any && at++ < pattern.size();
}

// False where llama-common would warn, and take any string. What is no regular expression at all is
// left to it, for it names the reason.
bool is_converted(const std::string & pattern) {
    constexpr int max_depth = 100;
    if (pattern.size() < 2 || pattern.front() != '^' || pattern.back() != '$') {
        return false;
    }
    const std::string body  = pattern.substr(1, pattern.size() - 2);
    int               depth = 0;
    for (size_t i = 0; i < body.size();) {
        const char c = body[i++];
        if (c == '(') {
            if (++depth > max_depth || (i < body.size() && body[i] == '?' && body[i + 1] != ':')) {
                return false;
            }
            i += i < body.size() && body[i] == '?' ? 2 : 0;
        } else if (c == ')') {
            --depth;
        } else if (c == '[') {
            while (i < body.size() && body[i] != ']') {
                const size_t n = body[i] == '\\' ? escape_length(body, i) : 1;
                if (n == 0) {
                    return false;
                }
                i += n;
            }
            ++i;
        } else if (c == '{') {
            if (!is_count(body, i)) {
                return false;
            }
        } else if (c == '\\' && i < body.size()) {
            const size_t n = is_one_of(body[i], "^$.[]()|{}*+?") ? 2 : escape_length(body, i - 1);
            if (n == 0) {
                return false;
            }
            i += n - 1;
        } else if (is_one_of(c, "^$]}")) {
            return false;
        }
    }
    return true;
}

// Rewrites a schema in place; where no keyword says that there is one, nothing is touched.
class Rewriter {
public:
    // References into an allOf would not find their target again.
    explicit Rewriter(const common_json & root)
        : inlines_(root.dump_safe().find("/allOf/") == std::string::npos) {}

    bool changed() const { return changed_; }

    void rewrite(common_json & schema) {
        if (!schema.is_object()) {
            return;
        }
        for (const char * key : {"properties", "$defs", "definitions"}) {
            if (has(schema, key) && schema.at(key).is_object()) {
                for (const auto & each : schema.at(key).items()) {
                    rewrite(each.value());
                }
            }
        }
        for (const char * key : {"allOf", "anyOf", "oneOf", "items", "prefixItems"}) {
            if (is_list(schema, key)) {
                for (common_json & each : schema.at(key)) {
                    rewrite(each);
                }
            }
        }
        for (const char * key : {"items", "prefixItems", "additionalProperties"}) {
            if (has(schema, key)) {
                rewrite(schema.at(key));
            }
        }
        inline_all_of(schema);
        drop_pattern(schema);
    }

private:
    void inline_all_of(common_json & schema) {
        if (!inlines_ || !is_list(schema, "allOf") || schema.at("allOf").size() != 1
            || any_of(schema, {"$ref", "anyOf", "oneOf", "const", "enum", "properties",
                               "additionalProperties"})
            || (has(schema, "type") && !is_text(schema, "type"))) {
            return;
        }
        const common_json member = schema.at("allOf").at((size_t) 0);
        const std::string type   = text(schema, "type");
        if (!member.is_object() || (!type.empty() && type != "object" && type != "string")) {
            return;
        }
        schema.erase("allOf");
        for (const auto & [name, value] : member.items()) {
            // Definitions stay where references look for them.
            if (!has(schema, name.c_str()) || (name != "$defs" && name != "definitions")) {
                schema[name] = value;
            }
        }
        changed_ = true;
    }

    void drop_pattern(common_json & schema) {
        if (!is_text(schema, "pattern") || is_converted(schema.at("pattern"))) {
            return;
        }
        schema.erase("pattern");
        if (!any_of(schema, {"type", "$ref", "anyOf", "oneOf", "const", "enum", "properties",
                             "additionalProperties", "allOf", "items", "prefixItems"})) {
            schema["type"] = "string";
        }
        changed_ = true;
    }

    const bool inlines_;
    bool       changed_ = false;
};

// Goes the ways of llama-common through a schema, which are three: it builds a tree, in which each
// reference is followed once; it visits that tree, where an allOf is a list of properties wherever
// it is met; and it looks through unions for strings, which follows the same reference many times.
class Walk {
public:
    enum Way { builds, visits, unites };

    Walk(const std::string & what, const common_json & root, Way way)
        : what_(what), root_(root), way_(way) {}

    // `name_size`: bytes of the name that the rule gets.
    void node(const common_json & schema, int depth, size_t name_size) {
        spend(depth, 1 + name_size / 64);
        if (!schema.is_object()) {
            return;
        }
        if (has(schema, "$ref")) {
            follow(schema, depth);
        } else if (any_of(schema, {"oneOf", "anyOf"})) {
            list(schema, has(schema, "oneOf") ? "oneOf" : "anyOf", depth, name_size);
        } else if (is_list(schema, "type")) {
            for (const common_json & type : schema.at("type")) {
                of_type(schema, type.is_string() ? type.get<std::string>() : "", depth + 1,
                        name_size);
            }
        } else {
            of_type(schema, text(schema, "type"), depth, name_size);
        }
    }

private:
    // A frame of the converter takes some 2 KiB of stack, of which a thread has 512 KiB.
    static constexpr int    max_depth      = 100;
    static constexpr size_t max_cost       = 100000;
    static constexpr size_t max_properties = 500;  // of one object: each optional one nests
    static constexpr size_t max_run        = 200;  // bytes, read by a recursive regular expression

    [[noreturn]] void refuse(const std::string & why) const {
        throw std::invalid_argument(what_ + ": " + why);
    }

    void spend(int depth, size_t cost) {
        if (depth > max_depth) {
            refuse("$ref and allOf lead in a circle, or more than " + std::to_string(max_depth)
                   + " levels deep");
        }
        cost_ += cost;
        if (cost_ > max_cost) {
            refuse("too large, with all that $ref, allOf and lists of types repeat");
        }
    }

    void check_name(const std::string & name) const {
        size_t run = 0;
        for (const char c : name) {
            run = std::isalnum((unsigned char) c) || c == '-' ? 0 : run + 1;
            if (run > max_run) {
                refuse("a name with more than " + std::to_string(max_run)
                       + " bytes other than letters and digits in a row");
            }
        }
    }

    const common_json * target(const std::string & ref) const {
        if (ref.compare(0, 2, "#/") != 0) {
            return nullptr;
        }
        const common_json * at    = &root_;
        const auto          steps = string_split(ref.substr(1), "/");
        for (size_t i = 1; i < steps.size(); ++i) {
            if (at->is_object() && at->contains(steps[i])) {
                at = &at->at(steps[i]);
                continue;
            }
            size_t index = 0;
            try {
                index = at->is_array() ? (size_t) std::stoull(steps[i]) : 0;
            } catch (const std::logic_error &) {
                return nullptr;
            }
            if (!at->is_array() || index >= at->size()) {
                return nullptr;
            }
            at = &at->at(index);
        }
        return at;
    }

    void follow(const common_json & schema, int depth) {
        if (!schema.at("$ref").is_string()) {
            return;
        }
        const std::string ref = schema.at("$ref");
        check_name(ref);
        if (!seen_.insert(ref).second) {
            return;
        }
        if (const common_json * found = target(ref)) {
            const common_json * end = found;
            for (int n = 0; end && end->is_object() && is_text(*end, "$ref"); ++n) {
                spend(n, 0);  // a circle of nothing but references means no value
                end = target(text(*end, "$ref"));
            }
            node(*found, depth + 1, ref.size());
        }
        if (way_ == unites) {
            seen_.erase(ref);
        }
    }

    void list(const common_json & schema, const char * key, int depth, size_t name_size) {
        if (is_list(schema, key)) {
            for (const common_json & each : schema.at(key)) {
                node(each, depth + 1, name_size + 4);
            }
        }
    }

    void of_type(const common_json & schema, const std::string & type, int depth,
                 size_t name_size) {
        spend(depth, 1);
        if (any_of(schema, {"const", "enum"})) {
            return;
        }
        const bool is_object = type == "object";
        const bool untyped   = type.empty();
        const bool has_properties =
            has(schema, "properties")
            || (has(schema, "additionalProperties") && schema.at("additionalProperties") != true);
        if (has(schema, "allOf")
            && (type == "string" || ((untyped || is_object) && !has_properties))) {
            all_of(schema, depth, name_size);
        } else if (way_ == unites) {
            return;  // only what is in unions
        } else if (is_object || (untyped && has_properties)) {
            size_t n = 0;
            properties(schema, depth, name_size, n);
            if (has(schema, "additionalProperties")) {
                node(schema.at("additionalProperties"), depth + 1, name_size + 16);
            }
        } else if (type == "array" || untyped) {
            const char * key = has(schema, "items") ? "items" : "prefixItems";
            list(schema, key, depth, name_size);
            if (has(schema, key) && !is_list(schema, key)) {
                node(schema.at(key), depth + 1, name_size + 5);
            }
        }
    }

    void properties(const common_json & schema, int depth, size_t name_size, size_t & n) {
        if (!has(schema, "properties") || !schema.at("properties").is_object()) {
            return;
        }
        for (const auto & [name, value] : schema.at("properties").items()) {
            check_name(name);
            if (++n > max_properties) {
                refuse("more than " + std::to_string(max_properties) + " properties of one object");
            }
            node(value, depth + 1, name_size + 1 + name.size());
            if (way_ == builds) {
                Walk unions(what_, root_, unites);
                unions.node(value, depth, 0);
                cost_ += unions.cost_;
            }
        }
    }

    void all_of(const common_json & schema, int depth, size_t name_size) {
        if (way_ != visits) {
            list(schema, "allOf", depth, name_size);
            return;
        }
        size_t n = 0;
        for (const common_json & each : schema.at("allOf")) {
            const char * key = has(each, "oneOf") ? "oneOf" : "anyOf";
            if (!has(each, "$ref") && is_list(each, key)) {
                for (const common_json & alternative : each.at(key)) {
                    component(alternative, depth + 1, name_size, n);
                }
            } else {
                component(each, depth + 1, name_size, n);
            }
        }
    }

    void component(const common_json & schema, int depth, size_t name_size, size_t & n) {
        spend(depth, 1);
        if (is_text(schema, "$ref")) {
            if (const common_json * found = target(schema.at("$ref"))) {
                component(*found, depth + 1, name_size, n);
            }
        } else if (schema.is_object() && !any_of(schema, {"oneOf", "anyOf", "const", "enum"})) {
            properties(schema, depth, name_size, n);
        }
    }

    const std::string &   what_;
    const common_json &   root_;
    const Way             way_;
    std::set<std::string> seen_;
    size_t                cost_ = 0;
};

}  // namespace

bool prepare_schema(const std::string & what, common_json & schema) {
    Rewriter rewriter(schema);
    rewriter.rewrite(schema);
    for (const Walk::Way way : {Walk::builds, Walk::visits}) {
        Walk(what, schema, way).node(schema, 0, 0);
    }
    return rewriter.changed();
}

}  // namespace llama_crab
