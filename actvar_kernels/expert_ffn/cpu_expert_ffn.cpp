// Compute the expert FFN on the CPU: each expert's tokens go through up projection, GELU and down projection into their
// sums. Threads split tokens, or columns where tokens are few. No two threads write to the same sum, so that the result
// does not depend on their number. cpu_kernel.py packs the weights and calls `expert_ffn`.

#include <cstddef>
#include <cstdint>

namespace {

struct Job {
    const void *u;        // [tokens, channels]
    const uint8_t *mask;  // [tokens, experts]
    const void *weight1, *weight2;
    const float *bias1, *bias2;  // padded like the columns of the weights
    void *out;                   // [tokens, channels]
    int tokens, channels, experts, width;
};

constexpr int FEW_TOKENS = 64;  // Threads split columns up to this many tokens.

}  // namespace

#define KERNEL "../expert_ffn/cpu_tile.h"
#include "../cpu_backend/isa.h"

namespace {

struct Isa {
    size_t (*scratch_bytes[3])(const Job &, int, int);
    void (*runs[3])(const Job &, int, int, char *);
    void (*runs_few[3])(const Job &, char *, int);
};

#define ISA_OF(isa) {FOR_EVERY_KIND(isa::scratch_bytes), FOR_EVERY_KIND(isa::run), FOR_EVERY_KIND(isa::run_few)},
const Isa ISAS[] = {FOR_EVERY_ISA(ISA_OF)};

constexpr int MAX_CHUNK = 192;  // A panel of weights stays in the cache for this many tokens.

}  // namespace

// Compute the FFN and return 0, or 1 when memory ran out.
extern "C" int expert_ffn(int isa, int kind, const void *u, const void *mask, const void *weight1,
                          const void *bias1, const void *weight2, const void *bias2, void *out, int tokens,
                          int channels, int experts, int width, int threads) {
    const Job job = {u,   (const uint8_t *)mask, weight1, weight2,  (const float *)bias1, (const float *)bias2,
                     out, tokens,                channels, experts, width};
    const Isa &ops = ISAS[isa];
    int failed = 0;
    if (tokens <= FEW_TOKENS) {
        const Scratch scratch(ops.scratch_bytes[kind](job, tokens, experts) + 4 * (size_t)experts, failed);
        if (!failed) ops.runs_few[kind](job, scratch.bytes, threads);
        return failed;
    }
    int chunks = (tokens + MAX_CHUNK - 1) / MAX_CHUNK;
    chunks = padded(chunks < threads ? threads : chunks, threads);
    const int longest = (tokens + chunks - 1) / chunks;
#pragma omp parallel num_threads(threads)
    {
        const Scratch scratch(ops.scratch_bytes[kind](job, longest, 1), failed);
#pragma omp for schedule(dynamic, 1)
        for (int chunk = 0; chunk < chunks; chunk++) {
            const int begin = (int64_t)tokens * chunk / chunks, end = (int64_t)tokens * (chunk + 1) / chunks;
            if (scratch.bytes != nullptr && begin < end) ops.runs[kind](job, begin, end, scratch.bytes);
        }
    }
    return failed;
}
