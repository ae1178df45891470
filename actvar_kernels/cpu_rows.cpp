// Steps that go over rows of channels on the CPU, each in one or two passes over memory: LayerNorm with modulation, alone,
// of the rows that a selector keeps, or after the residual of rows that are taken by their index and before a router;
// and a residual that is put back. Sums are in float32. cpu_rows.py calls the functions at the end.

#include "cpu_numbers.h"

#include <omp.h>

#include <cmath>
#include <cstdint>
#include <new>

namespace {

// sum = x + gamma * update as it is stored, or x where there is no update; out = LN(sum) * (1 + scale) + shift.
template <class T>
INLINED void row(
    const T *x, const T *update, const float *gamma, const float *scale, const float *shift, T *sum, T *out,
    float *wide, int channels, float eps) {
    float total = 0;
    if (update) {
#pragma omp simd reduction(+ : total)
        for (int c = 0; c < channels; ++c) {
            sum[c] = rounded<T>(to_float(x[c]) + gamma[c] * to_float(update[c]));
            wide[c] = to_float(sum[c]);
            total += wide[c];
        }
    } else {
#pragma omp simd reduction(+ : total)
        for (int c = 0; c < channels; ++c) {
            wide[c] = to_float(x[c]);
            total += wide[c];
        }
    }
    const float mean = total / channels;
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int c = 0; c < channels; ++c) squares += (wide[c] - mean) * (wide[c] - mean);
    const float factor = 1 / std::sqrt(squares / channels + eps);
#pragma omp simd
    for (int c = 0; c < channels; ++c)
        out[c] = rounded<T>((wide[c] - mean) * factor * (1 + scale[c]) + shift[c]);
}

FOR_EVERY_PROCESSOR void row_of(
    const float *x, const float *update, const float *gamma, const float *scale, const float *shift, float *sum,
    float *out, float *wide, int channels, float eps) {
    row(x, update, gamma, scale, shift, sum, out, wide, channels, eps);
}

FOR_EVERY_PROCESSOR void row_of(
    const bfloat16 *x, const bfloat16 *update, const float *gamma, const float *scale, const float *shift,
    bfloat16 *sum, bfloat16 *out, float *wide, int channels, float eps) {
    row(x, update, gamma, scale, shift, sum, out, wide, channels, eps);
}

// LN(x) @ weight + bias.
template <class T>
INLINED float score(const T *x, const float *weight, float bias, float *wide, int channels, float eps) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int c = 0; c < channels; ++c) {
        wide[c] = to_float(x[c]);
        total += wide[c];
    }
    const float mean = total / channels;
    float squares = 0, sum = 0;
#pragma omp simd reduction(+ : squares, sum)
    for (int c = 0; c < channels; ++c) {
        squares += (wide[c] - mean) * (wide[c] - mean);
        sum += (wide[c] - mean) * weight[c];
    }
    return sum / std::sqrt(squares / channels + eps) + bias;
}

FOR_EVERY_PROCESSOR float score_of(
    const float *x, const float *weight, float bias, float *wide, int channels, float eps) {
    return score(x, weight, bias, wide, channels, eps);
}

FOR_EVERY_PROCESSOR float score_of(
    const bfloat16 *x, const float *weight, float bias, float *wide, int channels, float eps) {
    return score(x, weight, bias, wide, channels, eps);
}

INLINED int32_t rank_key(float score) {  // NaN before all others, as PyTorch sorts
    return score != score ? INT32_MAX : ordered(score);
}

// Indices of the `keep` highest scores, ties to the lower index, in ascending order.
FOR_EVERY_PROCESSOR void top_indices(const float *scores, int32_t *keys, int length, int keep, int64_t *index) {
    for (int i = 0; i < length; ++i) keys[i] = rank_key(scores[i]);
    const int32_t threshold =
        last_key(INT32_MIN, INT32_MAX, [&](int32_t key) { return reaching(keys, length, key) >= keep; });
    int64_t ties = keep - (threshold == INT32_MAX ? 0 : reaching(keys, length, threshold + 1));
    for (int i = 0; i < length; ++i)
        if (keys[i] > threshold || (keys[i] == threshold && ties-- > 0)) *index++ = i;
}

struct Router {
    const float *weight, *bias;  // [experts, channels], [experts]
    float *logits;               // [rows, experts]
    uint8_t *mask;
    int experts, active;
};

// Logits of a row, and which of them are the highest, ties to the lower index.
template <class T>
INLINED void route(const T *u, const Router &router, int64_t row, float *wide, int channels) {
    float *logits = router.logits + row * router.experts;
    uint8_t *mask = router.mask + row * router.experts;
#pragma omp simd
    for (int c = 0; c < channels; ++c) wide[c] = to_float(u[c]);
    for (int e = 0; e < router.experts; e += 4) {  // four sums at a time, since additions to one wait for each other
        const float *weights[4];
        for (int i = 0; i < 4; ++i) {
            const int expert = e + i < router.experts ? e + i : e;
            weights[i] = router.weight + int64_t(expert) * channels;
        }
        float first = 0, second = 0, third = 0, fourth = 0;
#pragma omp simd reduction(+ : first, second, third, fourth)
        for (int c = 0; c < channels; ++c) {
            first += wide[c] * weights[0][c];
            second += wide[c] * weights[1][c];
            third += wide[c] * weights[2][c];
            fourth += wide[c] * weights[3][c];
        }
        const float sums[] = {first, second, third, fourth};
        for (int i = 0; i < 4 && e + i < router.experts; ++i) logits[e + i] = sums[i] + router.bias[e + i];
    }
    for (int e = 0; e < router.experts; ++e) {
        const int32_t key = rank_key(logits[e]);
        int before = 0;
        for (int other = 0; other < router.experts; ++other) {
            const int32_t its = rank_key(logits[other]);
            before += (its > key) | ((its == key) & (other < e));
        }
        mask[e] = before < router.active;
    }
}

FOR_EVERY_PROCESSOR void route_of(const float *u, const Router &router, int64_t row, float *wide, int channels) {
    route(u, router, row, wide, channels);
}

FOR_EVERY_PROCESSOR void route_of(const bfloat16 *u, const Router &router, int64_t row, float *wide, int channels) {
    route(u, router, row, wide, channels);
}

template <class T>
INLINED void add(const T *x, const T *update, const float *gamma, T *sum, int channels) {
#pragma omp simd
    for (int c = 0; c < channels; ++c) sum[c] = rounded<T>(to_float(x[c]) + gamma[c] * to_float(update[c]));
}

FOR_EVERY_PROCESSOR void add_of(const float *x, const float *update, const float *gamma, float *sum, int channels) {
    add(x, update, gamma, sum, channels);
}

FOR_EVERY_PROCESSOR void add_of(
    const bfloat16 *x, const bfloat16 *update, const float *gamma, bfloat16 *sum, int channels) {
    add(x, update, gamma, sum, channels);
}

// As many as the work is worth.
inline int threads_for(int64_t numbers, int threads) { return numbers < (1 << 14) ? 1 : threads; }

// One row of float32 for each thread.
struct Scratch {
    float *rows;
    int channels;
    Scratch(int threads, int channels) : rows(new (std::nothrow) float[size_t(threads) * channels]), channels(channels) {}
    ~Scratch() { delete[] rows; }
    float *own() const { return rows + size_t(omp_get_thread_num()) * channels; }
};

template <class T>
int rows(
    const T *x, const int64_t *index, const T *update, const float *gamma, const float *scale, const float *shift,
    T *sum, T *out, int64_t sequences, int64_t kept, int channels, int64_t sequence_stride, int64_t row_stride,
    float eps, const Router &router, int threads) {
    threads = threads_for(sequences * kept * channels, threads);
    const Scratch scratch(threads, channels);
    if (!scratch.rows) return 1;
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < sequences * kept; ++i) {
        const int64_t sequence = i / kept, vector = sequence * channels, written = i * channels;
        const T *source = x + sequence * sequence_stride + (index ? index[i] : i % kept) * row_stride;
        row_of(
            source, update ? update + written : nullptr, update ? gamma + vector : nullptr, scale + vector,
            shift + vector, update ? sum + written : nullptr, out + written, scratch.own(), channels, eps);
        if (router.experts) route_of(out + written, router, i, scratch.own(), channels);
    }
    return 0;
}

template <class T>
int select(
    const T *x, const float *weight, float bias, const float *scale, const float *shift, float *scores, int64_t *index,
    T *out, int64_t sequences, int64_t length, int64_t keep, int channels, int64_t sequence_stride, int64_t row_stride,
    bool halves_share, float eps, int threads) {
    threads = threads_for(sequences * length * channels, threads);
    const int64_t deciding = halves_share ? sequences / 2 : sequences;
    const Scratch scratch(threads, channels), keys(threads, int(length));
    if (!scratch.rows || !keys.rows) return 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t i = 0; i < sequences * length; ++i)
            scores[i] = score_of(
                x + i / length * sequence_stride + i % length * row_stride, weight, bias, scratch.own(), channels, eps);
#pragma omp for
        for (int64_t i = 0; i < deciding; ++i) {
            top_indices(scores + i * length, (int32_t *)keys.own(), int(length), int(keep), index + i * keep);
            if (halves_share) std::memcpy(index + (i + deciding) * keep, index + i * keep, keep * sizeof *index);
        }
    }
    return rows<T>(
        x, index, nullptr, nullptr, scale, shift, nullptr, out, sequences, keep, channels, sequence_stride, row_stride,
        eps, Router{}, threads);
}

template <class T>
void scatter(
    T *rest, const int64_t *index, const T *x, const T *update, const float *gamma, int64_t sequences, int64_t kept,
    int channels, int64_t sequence_stride, int64_t row_stride, int threads) {
    threads = threads_for(sequences * kept * channels, threads);
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < sequences * kept; ++i) {
        const int64_t sequence = i / kept;
        T *to = rest + sequence * sequence_stride + (index ? index[i] : i % kept) * row_stride;
        add_of(x + i * channels, update + i * channels, gamma + sequence * channels, to, channels);
    }
}

}  // namespace

// The functions that can run out of memory return 1 then, otherwise 0. x has neighbouring channels and the given
// strides; gamma, scale and shift are [sequences, channels], everything else is contiguous.
extern "C" {

// x [sequences, length, channels]; update, sum and out [sequences, kept, channels]; index [sequences, kept] or null: all
// rows. Without an update there is no sum. With experts: router [experts, channels], logits and mask [sequences, kept,
// experts].
int add_normalize(
    int is_bfloat16, const void *x, const int64_t *index, const void *update, const float *gamma, const float *scale,
    const float *shift, void *sum, void *out, int64_t sequences, int64_t kept, int64_t channels,
    int64_t sequence_stride, int64_t row_stride, float eps, const float *router_weight, const float *router_bias,
    float *logits, uint8_t *mask, int64_t experts, int64_t active, int threads) {
    const Router router{router_weight, router_bias, logits, mask, int(experts), int(active)};
    if (is_bfloat16)
        return rows(
            (const bfloat16 *)x, index, (const bfloat16 *)update, gamma, scale, shift, (bfloat16 *)sum,
            (bfloat16 *)out, sequences, kept, channels, sequence_stride, row_stride, eps, router, threads);
    return rows(
        (const float *)x, index, (const float *)update, gamma, scale, shift, (float *)sum, (float *)out, sequences,
        kept, channels, sequence_stride, row_stride, eps, router, threads);
}

// x [sequences, length, channels]; weight [channels]; scores [sequences, length]; index [sequences, keep]; out [sequences,
// keep, channels]. Where halves share, the first half of the sequences decides for the second.
int select_rows(
    int is_bfloat16, const void *x, const float *weight, const float *bias, const float *scale, const float *shift,
    float *scores, int64_t *index, void *out, int64_t sequences, int64_t length, int64_t keep, int64_t channels,
    int64_t sequence_stride, int64_t row_stride, int halves_share, float eps, int threads) {
    if (is_bfloat16)
        return select(
            (const bfloat16 *)x, weight, *bias, scale, shift, scores, index, (bfloat16 *)out, sequences, length, keep,
            channels, sequence_stride, row_stride, halves_share, eps, threads);
    return select(
        (const float *)x, weight, *bias, scale, shift, scores, index, (float *)out, sequences, length, keep, channels,
        sequence_stride, row_stride, halves_share, eps, threads);
}

// rest [sequences, length, channels] with the given strides: at index [sequences, kept], or at all rows, x + gamma * update,
// both [sequences, kept, channels].
void scatter_rows(
    int is_bfloat16, void *rest, const int64_t *index, const void *x, const void *update, const float *gamma,
    int64_t sequences, int64_t kept, int64_t channels, int64_t sequence_stride, int64_t row_stride, int threads) {
    if (is_bfloat16)
        scatter(
            (bfloat16 *)rest, index, (const bfloat16 *)x, (const bfloat16 *)update, gamma, sequences, kept, channels,
            sequence_stride, row_stride, threads);
    else
        scatter(
            (float *)rest, index, (const float *)x, (const float *)update, gamma, sequences, kept, channels,
            sequence_stride, row_stride, threads);
}
}
