// Fused expert FFN on the CPU: for every expert the rows of the tokens that chose it, up projection, GELU, and down
// projection straight onto the tokens' sums. Tokens are split over threads, so no two threads write to a row and the
// result does not depend on their number. cpu_kernel.py packs the weights and calls `expert_ffn`.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

typedef uint16_t bfloat16;

struct Job {
    const void *u;        // [tokens, channels]
    const uint8_t *mask;  // [tokens, experts]
    const void *weight1, *weight2;
    const float *bias1, *bias2;  // padded like the columns of the weights
    void *out;                   // [tokens, channels]
    int tokens, channels, experts, width;
};

constexpr int padded(int count, int to) { return (count + to - 1) / to * to; }

#define NAMESPACE portable
#define LANES 4
#define VECTORS 2
#define ROWS 4
#define DOT 0
#include "cpu_tile.h"
#undef NAMESPACE
#undef LANES
#undef VECTORS
#undef ROWS

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define NAMESPACE avx2
#define LANES 8
#define VECTORS 2
#define ROWS 6
#include "cpu_tile.h"
#undef NAMESPACE
#undef LANES
#undef VECTORS
#undef ROWS
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#define NAMESPACE avx512
#define LANES 16
#define VECTORS 4
#define ROWS 6
#include "cpu_tile.h"
#undef NAMESPACE
#undef DOT
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#define NAMESPACE avx512_bf16
#define DOT 1
#include "cpu_tile.h"
#pragma GCC pop_options
#endif

typedef void (*Run)(const Job &, int, int, char *);

struct Level {
    const char *name;
    int lanes, vectors, step;  // step: of bfloat16
    Run runs[2];               // float32, bfloat16
};

const Level LEVELS[] = {
    {"portable", 4, 2, 1, {portable::run<float>, portable::run<bfloat16>}},
#if defined(__x86_64__)
    {"AVX2", 8, 2, 1, {avx2::run<float>, avx2::run<bfloat16>}},
    {"AVX-512", 16, 4, 1, {avx512::run<float>, avx512::run<bfloat16>}},
    {"AVX-512 with bfloat16", 16, 4, 2, {avx512_bf16::run<float>, avx512_bf16::run<bfloat16>}},
#endif
};

}  // namespace

extern "C" {

// The highest level that this processor runs.
int best_level() {
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!wide) return 1;
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
    return 0;
#endif
}

const char *level_name(int level) { return LEVELS[level].name; }

// How the weights are packed: floats of a vector, vectors of a panel, rows that lie side by side (of bfloat16).
void level_layout(int level, int *layout) {
    layout[0] = LEVELS[level].lanes, layout[1] = LEVELS[level].vectors, layout[2] = LEVELS[level].step;
}

// 0, or 1 when memory ran out.
int expert_ffn(int level, int is_bfloat16, const void *u, const void *mask, const void *weight1, const void *bias1,
               const void *weight2, const void *bias2, void *out, int tokens, int channels, int experts, int width,
               int threads) {
    const Job job = {u,   (const uint8_t *)mask, weight1, weight2,  (const float *)bias1, (const float *)bias2,
                     out, tokens,                channels, experts, width};
    const int lanes = LEVELS[level].lanes;
    const Run run = LEVELS[level].runs[is_bfloat16];
    const int most = 512;  // tokens that go over a panel of weights while it is in the cache
    int chunks = (tokens + most - 1) / most;
    chunks = padded(chunks < threads ? threads : chunks, threads);
    const size_t longest = (tokens + chunks - 1) / chunks;
    const size_t bytes = longest * ((size_t)4 * padded(channels, lanes) + (size_t)4 * padded(width, lanes) + 4) + 64;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        char *scratch = (char *)aligned_alloc(64, (bytes + 63) / 64 * 64);
        if (scratch == nullptr) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int chunk = 0; chunk < chunks; chunk++) {
            const int begin = (int64_t)tokens * chunk / chunks, end = (int64_t)tokens * (chunk + 1) / chunks;
            if (scratch != nullptr && begin < end) run(job, begin, end, scratch);
        }
        free(scratch);
    }
    return failed;
}
}
