// Run steps over rows of channels on the CPU, each in one or two passes over memory. A modulated LayerNorm runs alone,
// on rows that a selector keeps, or after a residual and before a router. Another step puts a residual back. Sums are
// in float32. row_ops.py calls the functions at the end.

#include "keys.h"

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace {

struct Router {
    const float *weight, *bias;  // [channels, experts] in panels; [experts]
    float *logits;               // [rows, experts]
    uint8_t *mask;
    int experts, active;
};

// Describe a call: sum = x + gamma * update, or x without an update, in x's dtype; out = LN(sum) * (1 + scale) + shift.
struct Rows {
    const void *x;
    const int64_t *index;
    const void *update;
    const float *gamma, *scale, *shift;
    void *sum, *out;
    int64_t sequences, kept, sequence_stride, row_stride;
    int channels;
    float eps;
    Router router;
};

INLINED int32_t rank_key(float score) {  // NaN comes before all others, as PyTorch sorts.
    return score != score ? INT32_MAX : order_key(score);
}

}  // namespace

#define KERNEL "rows_tile.h"
#include "isa.h"

namespace {

struct Isa {
    void (*normalize[3])(const Rows &, int64_t, int, float *);
    float (*score[3])(const void *, const float *, float, float *, int, float);
    void (*add[3])(void *, const void *, const void *, const float *, int);
    size_t (*scratch_bytes)(const Rows &);
    int rows;
};

#define ISA_OF(isa)                                                                                                \
    {FOR_EVERY_KIND(isa::normalize), FOR_EVERY_KIND(isa::score), FOR_EVERY_KIND(isa::add), isa::scratch_bytes, \
     isa::TILE},
const Isa ISAS[] = {FOR_EVERY_ISA(ISA_OF)};

// Write the indices of the `keep` highest scores in ascending order; ties go to the lower index.
FOR_EVERY_PROCESSOR void top_indices(const float *scores, int32_t *keys, int length, int keep, int64_t *index) {
    for (int i = 0; i < length; ++i) keys[i] = rank_key(scores[i]);
    const int32_t threshold =
        last_key(INT32_MIN, INT32_MAX, [&](int32_t key) { return count_reaching(keys, length, key) >= keep; });
    int64_t ties = keep - (threshold == INT32_MAX ? 0 : count_reaching(keys, length, threshold + 1));
    for (int i = 0; i < length; ++i)
        if (keys[i] > threshold || (keys[i] == threshold && ties-- > 0)) *index++ = i;
}

// Return the number of threads that the work is worth.
inline int threads_for(int64_t numbers, int threads) { return numbers < (1 << 14) ? 1 : threads; }

int normalize(int isa, int kind, const Rows &job, int threads) {
    const Isa &ops = ISAS[isa];
    const int64_t rows = job.sequences * job.kept;
    int failed = 0;
#pragma omp parallel num_threads(threads_for(rows * job.channels, threads))
    {
        const Scratch scratch(ops.scratch_bytes(job), failed);
#pragma omp for
        for (int64_t first = 0; first < rows; first += ops.rows)
            if (scratch.bytes != nullptr)
                ops.normalize[kind](job, first, first + ops.rows < rows ? ops.rows : int(rows - first),
                                    (float *)scratch.bytes);
    }
    return failed;
}

}  // namespace

// Functions that can run out of memory return 1 then, otherwise 0. x and base have neighbouring channels and the given
// strides. gamma, scale and shift are [sequences, channels], and all other arrays are contiguous.
extern "C" {

// Normalize rows of x [sequences, length, channels], at index [sequences, kept] or all where it is null. update, sum
// and out are [sequences, kept, channels]; without an update there is no sum, without a scale neither sum nor out. With
// experts, logits and mask are [sequences, kept, experts].
int add_normalize(
    int isa, int kind, const void *x, const int64_t *index, const void *update, const float *gamma,
    const float *scale, const float *shift, void *sum, void *out, int64_t sequences, int64_t kept, int64_t channels,
    int64_t sequence_stride, int64_t row_stride, float eps, const float *router_weight, const float *router_bias,
    float *logits, uint8_t *mask, int64_t experts, int64_t active, int threads) {
    const Router router{router_weight, router_bias, logits, mask, int(experts), int(active)};
    const Rows job{x, index, update, gamma, scale, shift, sum, out, sequences, kept, sequence_stride, row_stride,
                   int(channels), eps, router};
    return normalize(isa, kind, job, threads);
}

// Score x [sequences, length, channels] with weight [channels] into scores [sequences, length]. Put the best rows into
// index [sequences, keep], and normalized into out [sequences, keep, channels]. A shared choice is the first half's.
int select_rows(
    int isa, int kind, const void *x, const float *weight, const float *bias, const float *scale,
    const float *shift, float *scores, int64_t *index, void *out, int64_t sequences, int64_t length, int64_t keep,
    int64_t channels, int64_t sequence_stride, int64_t row_stride, int halves_share, float eps, int threads) {
    const Isa &ops = ISAS[isa];
    const int64_t deciders = halves_share ? sequences / 2 : sequences, bytes = kind ? 2 : 4;
    int failed = 0;
#pragma omp parallel num_threads(threads_for(sequences * length * channels, threads))
    {
        const Scratch row(4 * channels, failed), keys(4 * length, failed);
#pragma omp barrier
        if (!failed) {
#pragma omp for
            for (int64_t i = 0; i < sequences * length; ++i) {
                const int64_t offset = i / length * sequence_stride + i % length * row_stride;
                const char *from = (const char *)x + offset * bytes;
                scores[i] = ops.score[kind](from, weight, *bias, (float *)row.bytes, int(channels), eps);
            }
#pragma omp for
            for (int64_t i = 0; i < deciders; ++i) {
                top_indices(scores + i * length, (int32_t *)keys.bytes, int(length), int(keep), index + i * keep);
                if (halves_share) std::memcpy(index + (i + deciders) * keep, index + i * keep, keep * sizeof *index);
            }
        }
    }
    const Rows job{x, index, nullptr, nullptr, scale, shift, nullptr, out, sequences, keep, sequence_stride, row_stride,
                   int(channels), eps, Router{}};
    return failed || normalize(isa, kind, job, threads);
}

// Store x + gamma * update, both [sequences, kept, channels], in rows of base [sequences, length, channels]. The rows
// are at index [sequences, kept], or all where it is null.
void scatter_rows(
    int isa, int kind, void *base, const int64_t *index, const void *x, const void *update, const float *gamma,
    int64_t sequences, int64_t kept, int64_t channels, int64_t sequence_stride, int64_t row_stride, int threads) {
    const int64_t bytes = kind ? 2 : 4;
#pragma omp parallel for num_threads(threads_for(sequences * kept * channels, threads))
    for (int64_t i = 0; i < sequences * kept; ++i) {
        const int64_t sequence = i / kept, from = i * channels * bytes;
        const int64_t to = sequence * sequence_stride + (index ? index[i] : i % kept) * row_stride;
        ISAS[isa].add[kind](
            (char *)base + to * bytes, (const char *)x + from, (const char *)update + from, gamma + sequence * channels,
            int(channels));
    }
}
}
