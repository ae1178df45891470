// Steps that go over rows of channels on the CPU, each in one pass over memory: LayerNorm with modulation, alone or
// after the residual of rows that are taken by their index. Sums are in float32. cpu_rows.py calls `add_normalize`.

#include "cpu_numbers.h"

#include <cmath>
#include <new>

namespace {

// sum = x + gamma * update as it is stored, or x where there is no update; out = LN(sum) * (1 + scale) + shift.
template <class T>
inline __attribute__((always_inline)) void row(
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

template <class T>
int rows(
    const T *x, const int64_t *index, const T *update, const float *gamma, const float *scale, const float *shift,
    T *sum, T *out, int64_t sequences, int64_t kept, int channels, int64_t sequence_stride, int64_t row_stride,
    float eps, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *wide = new (std::nothrow) float[channels];
        if (!wide) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for
        for (int64_t i = 0; i < sequences * kept; ++i) {
            if (!wide) continue;
            const int64_t sequence = i / kept, vector = sequence * channels, written = i * channels;
            const T *source = x + sequence * sequence_stride + (index ? index[i] : i % kept) * row_stride;
            row_of(
                source, update ? update + written : nullptr, update ? gamma + vector : nullptr, scale + vector,
                shift + vector, update ? sum + written : nullptr, out + written, wide, channels, eps);
        }
        delete[] wide;
    }
    return failed;
}

}  // namespace

// x [sequences, length, channels] with neighbouring channels and the given strides; update, sum and out
// [sequences, kept, channels]; gamma, scale and shift [sequences, channels]; index [sequences, kept] or null: all rows.
// Without an update there is no sum. Returns 0, or 1 when there was no memory.
extern "C" int add_normalize(
    int is_bfloat16, const void *x, const int64_t *index, const void *update, const float *gamma, const float *scale,
    const float *shift, void *sum, void *out, int64_t sequences, int64_t kept, int64_t channels,
    int64_t sequence_stride, int64_t row_stride, float eps, int threads) {
    if (is_bfloat16)
        return rows(
            (const bfloat16 *)x, index, (const bfloat16 *)update, gamma, scale, shift, (bfloat16 *)sum,
            (bfloat16 *)out, sequences, kept, channels, sequence_stride, row_stride, eps, threads);
    return rows(
        (const float *)x, index, (const float *)update, gamma, scale, shift, (float *)sum, (float *)out, sequences,
        kept, channels, sequence_stride, row_stride, eps, threads);
}
