// Compute checksums of memory to find a change of any number, including changes that PyTorch does not count.

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

typedef uint64_t pair __attribute__((vector_size(16)));  // Every processor has registers of 16 bytes.

constexpr int PAIRS = 4;
constexpr int64_t CHUNK = 256 * 1024;  // One thread sums this many bytes at once.
constexpr uint64_t ODD = 0x9e3779b97f4a7c15;

// Keep the sum of every lane's words and the sum of those sums, modulo 2^64. The second depends on the order of the
// words (Fletcher 1982).
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
    int64_t offset = 0;
    for (; offset + STEP <= bytes; offset += STEP) sums.add(data + offset);
    char tail[STEP] = {};
    std::memcpy(tail, data + offset, bytes - offset);
    sums.add(tail);
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

// Write the checksum of each of `count` pieces of memory to `out`, the same with any number of threads.
void checksums(int count, const void *const *data, const int64_t *bytes, uint64_t *out, int threads) {
    for (int i = 0; i < count; ++i) {
        const int64_t chunks = (bytes[i] + CHUNK - 1) / CHUNK;
        uint64_t total = 0;
#pragma omp parallel for num_threads(chunks < 4 ? 1 : threads) reduction(+ : total)
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t start = chunk * CHUNK, bytes_left = bytes[i] - start;
            const uint64_t sum = chunk_sum((const char *)data[i] + start, bytes_left < CHUNK ? bytes_left : CHUNK);
            total += (sum ^ (sum >> 29)) * (ODD + 2 * uint64_t(chunk));
        }
        out[i] = total;
    }
}
}
