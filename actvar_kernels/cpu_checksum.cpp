// Checksums of memory, by which a change of any number is found, also one that PyTorch does not count.

#include "cpu_keys.h"

#include <cstddef>
#include <cstdint>

namespace {

constexpr int LANES = 8;                  // words of 64 bits that are summed side by side
constexpr int64_t CHUNK = 256 * 1024;     // bytes that one thread sums at once
constexpr uint64_t ODD = 0x9e3779b97f4a7c15;

// Every lane has the sum of its words and the sum of those sums, which depends on their order (Fletcher 1982), modulo 2^64.
FOR_EVERY_PROCESSOR uint64_t chunk_sum(const char *data, int64_t bytes) {
    uint64_t sums[LANES] = {}, sums_of_sums[LANES] = {}, words[LANES];
    int64_t at = 0;
    for (; at + int64_t(sizeof words) <= bytes; at += sizeof words) {
        std::memcpy(words, data + at, sizeof words);
        for (int lane = 0; lane < LANES; ++lane) {
            sums[lane] += words[lane];
            sums_of_sums[lane] += sums[lane];
        }
    }
    std::memset(words, 0, sizeof words);
    std::memcpy(words, data + at, bytes - at);
    uint64_t total = bytes;
    for (int lane = 0; lane < LANES; ++lane) {
        sums[lane] += words[lane];
        sums_of_sums[lane] += sums[lane];
        total = (total ^ sums[lane]) * ODD;
        total = (total ^ (total >> 32) ^ sums_of_sums[lane]) * ODD;
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
