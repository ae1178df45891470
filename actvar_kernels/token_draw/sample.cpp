// `sample_tokens`: guidance, filters and draw of one position in a few passes over its row, from the random numbers of the
// Triton kernel. cpu_kernel.py calls it. Compiled without contraction of products and sums: the guided logits are the
// reference's bit for bit.

#include "filters.h"

#include <cstdlib>

namespace {

INLINED float between(float x, float low, float high) {
    x = x > low ? x : low;
    return x < high ? x : high;
}

INLINED float number_below_1(uint32_t random) {
    const int32_t bits = int32_t(random);
    return float(bits ^ (bits >> 31)) * 4.6566127342e-10f;
}

// Philox 4x32-10 with the key `seed` and the counters (group, row, step, 0), each of which gives four numbers in
// [0, 1 - 2^-24], as `tl.rand` makes them.
INLINED void random_numbers(float *to, int groups, uint64_t seed, uint32_t row, uint32_t step) {
#pragma omp simd
    for (int group = 0; group < groups; ++group) {
        uint32_t a = group, b = row, c = step, d = 0, key = uint32_t(seed), other_key = uint32_t(seed >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {
            const uint64_t first = uint64_t(a) * 0xD2511F53u, second = uint64_t(c) * 0xCD9E8D57u;
            a = uint32_t(second >> 32) ^ b ^ key;
            b = uint32_t(second);
            c = uint32_t(first >> 32) ^ d ^ other_key;
            d = uint32_t(first);
            key += 0x9E3779B9u, other_key += 0xBB67AE85u;
        }
        to[4 * group] = number_below_1(a);
        to[4 * group + 1] = number_below_1(b);
        to[4 * group + 2] = number_below_1(c);
        to[4 * group + 3] = number_below_1(d);
    }
}

struct Drawing {
    int size;
    float cond_factor, uncond_factor;
    int64_t top_k;
    bool filters_mass;
    double tail;  // 1 - top_p
    uint64_t seed;
    uint32_t step;
};

struct Scratch {  // of a row
    int32_t *keys;
    float *logits, *weights, *uniform;
};

// The token of one position: argmax(p / -log(u)), the lower one on a tie; 0 where a logit is NaN or infinite.
template <class T>
INLINED int64_t drawn(
    const T *cond, const T *uncond, const float *noise, uint32_t row, const Drawing &how, const Scratch &scratch) {
    const int size = how.size;
    const float cond_factor = how.cond_factor, uncond_factor = how.uncond_factor;
    int32_t *const keys = scratch.keys;
    float *const logits = scratch.logits, *const weights = scratch.weights;
    const int32_t impossible = ordered(-INFINITE);
    int32_t highest = impossible;
    int strange = 0;
#pragma omp simd reduction(| : strange) reduction(max : highest)
    for (int v = 0; v < size; ++v) {
        const float c = to_float(cond[v]), guided = cond_factor * c - uncond_factor * to_float(uncond[v]);
        const float x = c == -INFINITE ? -INFINITE : guided;
        logits[v] = x;
        keys[v] = ordered(x);
        strange |= x != x;
        highest = keys[v] > highest ? keys[v] : highest;
    }
    if (strange || highest >= ordered(INFINITE) || highest == impossible) return 0;

    int32_t threshold = impossible + 1;
    if (how.top_k > 0)
        threshold = last_key(
            threshold, highest, [=, &how](int32_t key) { return reaching(keys, size, key) >= how.top_k; });
    const float top = number_of(highest);
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (int v = 0; v < size; ++v) {
        weights[v] = masked(exponential(logits[v] - top), keys[v] >= threshold);
        total += weights[v];
    }
    if (how.filters_mass) {
        const double removable = how.tail * total;
        threshold = last_key(
            threshold, highest, [=](int32_t key) { return mass_below(keys, weights, size, key) <= removable; });
    }

    if (!noise) random_numbers(scratch.uniform, (size + 3) / 4, how.seed, row, how.step);
    const float *const uniform = noise ? noise : scratch.uniform;
    float best = 0;
#pragma omp simd reduction(max : best)
    for (int v = 0; v < size; ++v) {
        const float u = between(uniform[v], 1e-10f, 1 - 0x1p-24f);  // the reference's SMALLEST and LARGEST
        const float race = masked(weights[v], keys[v] >= threshold) / -logarithm(u, u - 1.0f);
        weights[v] = race;
        best = race > best ? race : best;
    }
    int token = 0;
    while (token < size - 1 && weights[token] != best) ++token;
    return token;
}

FOR_EVERY_PROCESSOR int64_t token_of(
    const float *cond, const float *uncond, const float *noise, uint32_t row, const Drawing &how, const Scratch &scratch) {
    return drawn(cond, uncond, noise, row, how, scratch);
}

FOR_EVERY_PROCESSOR int64_t token_of(
    const bfloat16 *cond, const bfloat16 *uncond, const float *noise, uint32_t row, const Drawing &how, const Scratch &scratch) {
    return drawn(cond, uncond, noise, row, how, scratch);
}

template <class T>
int tokens_of(
    const T *logits, const float *noise, int64_t *tokens, int64_t images, int64_t positions, int64_t image_stride,
    int64_t position_stride, int64_t uncond_offset, const Drawing &how, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        const int64_t bytes = (how.size + 3) * sizeof(float);
        char *memory = (char *)std::malloc(4 * bytes);
        if (!memory) {
#pragma omp atomic write
            failed = 1;
        }
        const Scratch scratch = {
            (int32_t *)memory, (float *)(memory + bytes), (float *)(memory + 2 * bytes), (float *)(memory + 3 * bytes)};
#pragma omp for schedule(dynamic, 4)
        for (int64_t i = 0; i < images * positions; ++i) {
            if (!memory) continue;
            const T *cond = logits + i / positions * image_stride + i % positions * position_stride;
            const float *of_row = noise ? noise + i * how.size : nullptr;
            tokens[i] = token_of(cond, cond + uncond_offset, of_row, uint32_t(i), how, scratch);
        }
        std::free(memory);
    }
    return failed;
}

}  // namespace

extern "C" {

// logits [2 * images, positions, size], conditional half first, or, where it is not guided, [images, positions, size], with
// neighbouring tokens and the given strides; noise [images, positions, size] or null: of the seed; tokens [images,
// positions]. Returns 0, or 1 when there was no memory.
int sample_tokens(
    int is_bfloat16, int is_guided, const void *logits, const float *noise, int64_t *tokens, int64_t images,
    int64_t positions, int64_t size, int64_t image_stride, int64_t position_stride, float cond_factor,
    float uncond_factor, int64_t top_k, int filters_mass, double tail, int64_t seed, int64_t step, int threads) {
    const Drawing how = {
        int(size), cond_factor, uncond_factor, top_k, filters_mass != 0, tail, uint64_t(seed), uint32_t(step)};
    const int64_t uncond_offset = is_guided ? images * image_stride : 0;
    if (is_bfloat16)
        return tokens_of(
            (const bfloat16 *)logits, noise, tokens, images, positions, image_stride, position_stride, uncond_offset,
            how, threads);
    return tokens_of(
        (const float *)logits, noise, tokens, images, positions, image_stride, position_stride, uncond_offset, how,
        threads);
}
}
