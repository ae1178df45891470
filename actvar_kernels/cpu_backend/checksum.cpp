// Checksums of memory, by which a change of any number is found, also one that PyTorch does not count.

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

typedef uint64_t pair __attribute__((vector_size(16)));  // a register of every processor

constexpr int PAIRS = 4;
constexpr int64_t CHUNK = 256 * 1024;  // bytes that one thread sums at once
constexpr uint64_t ODD = 0x9e3779b97f4a7c15;

// Every lane has the sum of its words and the sum of those sums, which depends on their order (Fletcher 1982), modulo
// 2^64.
struct Sums {
    pair sums[PAIRS] = {}, sums_of_sums[PAIRS] = {};

    inline void add(const char *data) {
#pragma GCC unroll 4
        for (int i = 0; i < PAIRS; ++i) {
            pair next;
            std::memcpy(&next, data + i * sizeof next, sizeof next);
            sums[i] += next;
            sums_of_sums[i] += sums[i];
        }
    }
};

uint64_t chunk_sum(const char *data, int64_t bytes) {
    constexpr int64_t STEP = PAIRS * sizeof(pair);
    Sums sums;
    int64_t at = 0;
    for (; at + STEP <= bytes; at += STEP) sums.add(data + at);
    char rest[STEP] = {};
    std::memcpy(rest, data + at, bytes - at);
    sums.add(rest);
    uint64_t total = bytes;
    for (int i = 0; i < PAIRS; ++i)
        for (int lane = 0; lane < 2; ++lane) {
            total = (total ^ sums.sums[i][lane]) * ODD;
            total = (total ^ (total >> 32) ^ sums.sums_of_sums[i][lane]) * ODD;
        }
    return total;
}

}  // namespace

extern "C" {

// The checksum of each of `count` pieces of memory. It does not depend on the number of threads.
void checksums(int count, const void *const *data, const int64_t *bytes, uint64_t *out, int threads) {
    for (int i = 0; i < count; ++i) {
        const int64_t chunks = (bytes[i] + CHUNK - 1) / CHUNK;
        uint64_t total = 0;
#pragma omp parallel for num_threads(chunks < 4 ? 1 : threads) reduction(+ : total)
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t start = chunk * CHUNK, left = bytes[i] - start;
            const uint64_t sum = chunk_sum((const char *)data[i] + start, left < CHUNK ? left : CHUNK);
            total += (sum ^ (sum >> 29)) * (ODD + 2 * uint64_t(chunk));
        }
        out[i] = total;
    }
}
}
