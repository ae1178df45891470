// Guide, filter and draw each position in a few passes over its row, with the random numbers of the Triton kernel.
// cpu_kernel.py calls `sample_tokens`. Products and sums are compiled without contraction, so that the guided logits
// are the reference's bit for bit.

#include "filters.h"

#include <cstdlib>

namespace {

INLINED float clamped(float x, float low, float high) {
    x = x > low ? x : low;
    return x < high ? x : high;
}

INLINED float uniform_number(uint32_t random) {
    const int32_t bits = int32_t(random);
    return float(bits ^ (bits >> 31)) * 4.6566127342e-10f;
}

// Write numbers of Philox 4x32-10 with the key `seed`, as `tl.rand` makes them. Each counter (group, row, step, 0)
// gives four numbers in [0, 1 - 2^-24].
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
        to[4 * group] = uniform_number(a);
        to[4 * group + 1] = uniform_number(b);
        to[4 * group + 2] = uniform_number(c);
        to[4 * group + 3] = uniform_number(d);
    }
}

struct Settings {
    int size;
    float cond_factor, uncond_factor;
    int64_t top_k;
    bool filters_mass;
    double tail;  // 1 - top_p
    uint64_t seed;
    uint32_t step;
};

struct Scratch {  // Hold the memory for one row.
    int32_t *keys;
    float *logits, *weights, *uniform;
};

// Return argmax(p / -log(u)) of one position, the lower on a tie, or 0 where a logit is NaN or inf, or all are -inf.
template <class T>
INLINED int64_t draw_inlined(
    const T *cond, const T *uncond, const float *noise, uint32_t row, const Settings &settings,
    const Scratch &scratch) {
    const int size = settings.size;
    const float cond_factor = settings.cond_factor, uncond_factor = settings.uncond_factor;
    int32_t *const keys = scratch.keys;
    float *const logits = scratch.logits, *const weights = scratch.weights;
    const int32_t lowest_key = order_key(-INFINITE);
    int32_t highest_key = lowest_key;
    int has_nan = 0;
#pragma omp simd reduction(| : has_nan) reduction(max : highest_key)
    for (int v = 0; v < size; ++v) {
        const float c = to_float(cond[v]), guided = cond_factor * c - uncond_factor * to_float(uncond[v]);
        const float x = c == -INFINITE ? -INFINITE : guided;
        logits[v] = x;
        keys[v] = order_key(x);
        has_nan |= x != x;
        highest_key = keys[v] > highest_key ? keys[v] : highest_key;
    }
    if (has_nan || highest_key >= order_key(INFINITE) || highest_key == lowest_key) return 0;

    int32_t threshold = lowest_key + 1;
    if (settings.top_k > 0)
        threshold = last_key(
            threshold, highest_key,
            [=, &settings](int32_t key) { return count_reaching(keys, size, key) >= settings.top_k; });
    const float highest_logit = number_of(highest_key);
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (int v = 0; v < size; ++v) {
        weights[v] = masked(exponential(logits[v] - highest_logit), keys[v] >= threshold);
        total += weights[v];
    }
    if (settings.filters_mass) {
        const double removable = settings.tail * total;
        threshold = last_key(
            threshold, highest_key, [=](int32_t key) { return mass_below(keys, weights, size, key) <= removable; });
    }

    if (!noise) random_numbers(scratch.uniform, (size + 3) / 4, settings.seed, row, settings.step);
    const float *const uniform = noise ? noise : scratch.uniform;
    float best_ratio = 0;
#pragma omp simd reduction(max : best_ratio)
    for (int v = 0; v < size; ++v) {
        const float u = clamped(uniform[v], 1e-10f, 1 - 0x1p-24f);  // The bounds are the reference's.
        const float ratio = masked(weights[v], keys[v] >= threshold) / -logarithm(u, u - 1.0f);
        weights[v] = ratio;
        best_ratio = ratio > best_ratio ? ratio : best_ratio;
    }
    int token = 0;
    while (token < size - 1 && weights[token] != best_ratio) ++token;
    return token;
}

FOR_EVERY_PROCESSOR int64_t draw_token(
    const float *cond, const float *uncond, const float *noise, uint32_t row, const Settings &settings,
    const Scratch &scratch) {
    return draw_inlined(cond, uncond, noise, row, settings, scratch);
}

FOR_EVERY_PROCESSOR int64_t draw_token(
    const bfloat16 *cond, const bfloat16 *uncond, const float *noise, uint32_t row, const Settings &settings,
    const Scratch &scratch) {
    return draw_inlined(cond, uncond, noise, row, settings, scratch);
}

template <class T>
int draw_tokens(
    const T *logits, const float *noise, int64_t *tokens, int64_t images, int64_t positions, int64_t image_stride,
    int64_t position_stride, int64_t uncond_offset, const Settings &settings, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        const int64_t bytes = (settings.size + 3) * sizeof(float);
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
            const float *row_noise = noise ? noise + i * settings.size : nullptr;
            tokens[i] = draw_token(cond, cond + uncond_offset, row_noise, uint32_t(i), settings, scratch);
        }
        std::free(memory);
    }
    return failed;
}

}  // namespace

extern "C" {

// Draw tokens [images, positions] and return 0, or 1 when memory ran out. Guided logits are [2 * images, positions,
// size], conditional half first, others [images, positions, size], with neighbouring tokens and the given strides.
// noise [images, positions, size] replaces the seed where it is not null.
int sample_tokens(
    int is_bfloat16, int is_guided, const void *logits, const float *noise, int64_t *tokens, int64_t images,
    int64_t positions, int64_t size, int64_t image_stride, int64_t position_stride, float cond_factor,
    float uncond_factor, int64_t top_k, int filters_mass, double tail, int64_t seed, int64_t step, int threads) {
    const Settings settings = {
        int(size), cond_factor, uncond_factor, top_k, filters_mass != 0, tail, uint64_t(seed), uint32_t(step)};
    const int64_t uncond_offset = is_guided ? images * image_stride : 0;
    if (is_bfloat16)
        return draw_tokens(
            (const bfloat16 *)logits, noise, tokens, images, positions, image_stride, position_stride, uncond_offset,
            settings, threads);
    return draw_tokens(
        (const float *)logits, noise, tokens, images, positions, image_stride, position_stride, uncond_offset, settings,
        threads);
}
}
