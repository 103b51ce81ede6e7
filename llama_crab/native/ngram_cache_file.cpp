// The file of an NgramCache: magic, version, bytes of an entry, key of the vocabulary, number of
// entries, the entries, checksum of all that. Numbers are little-endian, whatever the machine.
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

#ifdef _WIN32
#include <io.h>
#include <process.h>

#include <atomic>
#else
#include <unistd.h>
#endif

#include "ggml.h"
#include "ngram_cache.h"

namespace llama_crab {

namespace {

constexpr char     magic[9]      = "\x89NGRAMS\n";
constexpr uint32_t version       = 1;
constexpr size_t   entry_bytes   = 16;
constexpr size_t   header_bytes  = 32;
constexpr size_t   trailer_bytes = 8;
constexpr size_t   chunk_entries = 4096;

using File = std::unique_ptr<FILE, int (*)(FILE *)>;

void put_number(uint8_t * at, uint64_t number, int n_bytes) {
    for (int i = 0; i < n_bytes; ++i) {
        at[i] = (uint8_t) (number >> (8 * i));
    }
}

uint64_t get_number(const uint8_t * at, int n_bytes) {
    uint64_t number = 0;
    for (int i = 0; i < n_bytes; ++i) {
        number |= (uint64_t) at[i] << (8 * i);
    }
    return number;
}

// FNV-1a: every single changed byte changes it.
uint64_t checksum(uint64_t sum, const uint8_t * data, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        sum = (sum ^ data[i]) * 0x100000001B3u;
    }
    return sum;
}
constexpr uint64_t first_sum = 0xCBF29CE484222325u;

std::filesystem::path to_path(const std::string & path) {
#ifdef _WIN32
    return std::filesystem::u8path(path);
#else
    return path;
#endif
}

// A new file beside `path`, whose name goes to `name`; null with errno.
File create_beside(const std::string & path, std::string & name) {
#ifdef _WIN32
    static std::atomic<unsigned> counter{0};
    name = path + "." + std::to_string(_getpid()) + "-" + std::to_string(counter++) + ".tmp";
    return File(ggml_fopen(name.c_str(), "wbx"), std::fclose);
#else
    name = path + ".XXXXXX";
    const int fd = mkstemp(name.data());  // readable by its owner only
    return File(fd < 0 ? nullptr : fdopen(fd, "wb"), std::fclose);
#endif
}

bool to_disk(FILE * file) {
#ifdef _WIN32
    return std::fflush(file) == 0 && _commit(_fileno(file)) == 0;
#else
    return std::fflush(file) == 0 && fsync(fileno(file)) == 0;
#endif
}

// Writes or reads what the checksum covers.
class Stream {
public:
    explicit Stream(FILE * file) : file_(file) {}

    bool write(const uint8_t * data, size_t n) {
        sum_ = checksum(sum_, data, n);
        return std::fwrite(data, 1, n, file_) == n;
    }
    bool read(uint8_t * data, size_t n) {
        const bool whole = std::fread(data, 1, n, file_) == n;
        sum_ = checksum(sum_, data, whole ? n : 0);
        return whole;
    }
    uint64_t sum() const { return sum_; }

private:
    FILE *   file_;
    uint64_t sum_ = first_sum;
};

}  // namespace

// An entry of a file goes into its bucket; where that is full, the weakest is left out. Returns whether
// the bucket has one more.
bool NgramCache::put(std::vector<Bucket> & buckets, const Entry & entry) {
    Bucket &   bucket = buckets[index(entry.hash(), buckets.size())];
    size_t     place  = bucket.size() - 1;
    const bool more   = bucket[place].empty();
    if (!more) {
        for (size_t i = place; i-- > 0;) {
            if (bucket[i].count[0] < bucket[place].count[0]) {
                place = i;
            }
        }
        if (bucket[place].count[0] > entry.count[0]) {
            return false;
        }
    }
    for (; place > 0; --place) {
        bucket[place] = bucket[place - 1];
    }
    bucket[0] = entry;
    return more;
}

void NgramCache::save(const std::string & path, uint64_t key, Status & status) const {
    guarded(status, [&] {
        std::error_code             unknown;
        const std::filesystem::path target = to_path(path);
        if (std::filesystem::exists(target, unknown) &&
            !std::filesystem::is_regular_file(target, unknown)) {
            status.set(Status::failed, "not a regular file", EINVAL);
            return;
        }
        std::vector<Bucket> buckets;
        size_t              n_entries;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            buckets   = buckets_;
            n_entries = n_ngrams_;
        }
        std::vector<uint8_t> bytes(header_bytes);
        bytes.reserve((chunk_entries + 4) * entry_bytes + header_bytes);
        std::memcpy(bytes.data(), magic, 8);
        put_number(&bytes[8], version, 4);
        put_number(&bytes[12], entry_bytes, 4);
        put_number(&bytes[16], key, 8);
        put_number(&bytes[24], n_entries, 8);

        std::string name;
        File        file = create_beside(path, name);
        if (!file) {
            status.set(Status::failed, "cannot be created", errno);
            return;
        }
        Stream stream(file.get());
        bool   good = true;
        for (const Bucket & bucket : buckets) {
            // The one seen longest ago first: loading adds each in front of the others.
            for (size_t i = bucket.size(); i-- > 0;) {
                const Entry & entry = bucket[i];
                if (entry.empty()) {
                    continue;
                }
                const size_t at = bytes.size();
                bytes.resize(at + entry_bytes);
                put_number(&bytes[at], entry.hash_low, 4);
                put_number(&bytes[at + 4], entry.hash_high, 2);
                bytes[at + 6] = entry.count[0];
                bytes[at + 7] = entry.count[1];
                put_number(&bytes[at + 8], (uint32_t) entry.next[0], 4);
                put_number(&bytes[at + 12], (uint32_t) entry.next[1], 4);
            }
            if (bytes.size() >= chunk_entries * entry_bytes) {
                good = good && stream.write(bytes.data(), bytes.size());
                bytes.clear();
            }
        }
        good = good && stream.write(bytes.data(), bytes.size());
        bytes.resize(trailer_bytes);
        put_number(bytes.data(), stream.sum(), 8);
        good = good && stream.write(bytes.data(), bytes.size()) && to_disk(file.get());
        int code = errno;
        if (std::fclose(file.release()) != 0 && good) {
            good = false;
            code = errno;
        }
        std::error_code error;
        if (good) {
            std::filesystem::rename(to_path(name), target, error);
            good = !error;
            code = error.default_error_condition().value();
        }
        if (!good) {
            std::filesystem::remove(to_path(name), unknown);
            status.set(Status::failed, "cannot be written", code);
        }
    });
}

void NgramCache::load(const std::string & path, uint64_t key, int32_t n_vocab, Status & status) {
    guarded(status, [&] {
        std::error_code error;
        if (std::filesystem::exists(to_path(path), error) &&
            !std::filesystem::is_regular_file(to_path(path), error)) {
            status.set(Status::failed, "it is no regular file");
            return;
        }
        File file(ggml_fopen(path.c_str(), "rb"), std::fclose);
        if (!file) {
            status.set(Status::failed, "cannot be opened", errno);
            return;
        }
        // Of the open file: another one may have taken its name since.
        const bool     has_size = std::fseek(file.get(), 0, SEEK_END) == 0;
        const uint64_t n_bytes  = has_size ? (uint64_t) std::ftell(file.get()) : 0;
        std::rewind(file.get());
        Stream         stream(file.get());
        uint8_t        header[header_bytes];
        if (!has_size || !stream.read(header, header_bytes) || std::memcmp(header, magic, 8) != 0) {
            status.set(Status::failed, "it is no file of n-grams");
            return;
        }
        if (get_number(header + 8, 4) != version || get_number(header + 12, 4) != entry_bytes) {
            status.set(Status::failed, "it is of another version");
            return;
        }
        if (get_number(header + 16, 8) != key) {
            status.set(Status::failed, "it was made with another vocabulary");
            return;
        }
        const uint64_t n_entries = get_number(header + 24, 8);
        if (n_entries > max_capacity ||
            n_bytes != header_bytes + n_entries * entry_bytes + trailer_bytes) {
            status.set(Status::failed, "it is truncated or damaged");
            return;
        }
        std::vector<Bucket>  buckets(n_buckets_);
        size_t               n_ngrams = 0;
        std::vector<uint8_t> bytes(chunk_entries * entry_bytes);
        for (uint64_t n_left = n_entries; n_left > 0;) {
            const size_t n = (size_t) std::min<uint64_t>(n_left, chunk_entries);
            if (!stream.read(bytes.data(), n * entry_bytes)) {
                status.set(Status::failed, "it is truncated");
                return;
            }
            n_left -= n;
            for (size_t i = 0; i < n; ++i) {
                const uint8_t * at = &bytes[i * entry_bytes];
                Entry           entry;
                entry.hash_low  = (uint32_t) get_number(at, 4);
                entry.hash_high = (uint16_t) get_number(at + 4, 2);
                entry.count[0]  = at[6];
                entry.count[1]  = at[7];
                entry.next[0]   = (int32_t) get_number(at + 8, 4);
                entry.next[1]   = (int32_t) get_number(at + 12, 4);
                // A drafted token goes into a batch, where llama.cpp asserts what it may be.
                if (entry.next[0] < 0 || entry.next[0] >= n_vocab || entry.next[1] < -1 ||
                    entry.next[1] >= n_vocab || entry.count[0] < entry.count[1]) {
                    status.set(Status::failed, "it is damaged");
                    return;
                }
                n_ngrams += put(buckets, entry);
            }
        }
        const uint64_t sum = stream.sum();
        uint8_t        trailer[trailer_bytes];
        if (!stream.read(trailer, trailer_bytes) || get_number(trailer, 8) != sum) {
            status.set(Status::failed, "it is damaged: its checksum is wrong");
            return;
        }
        std::lock_guard<std::mutex> lock(mutex_);
        buckets_.swap(buckets);
        n_ngrams_ = n_ngrams;
    });
}

}  // namespace llama_crab
