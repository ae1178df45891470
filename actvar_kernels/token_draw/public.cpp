// Draw tokens on the CPU as the public code does with PyTorch. `guide_and_filter` makes a few passes over a position's
// row, and `draw` repeats `torch.multinomial` with the same random numbers. cpu_public.py calls both. Products and sums
// are compiled without contraction, so that the guided logits are PyTorch's bit for bit.

#include "filters.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <omp.h>

namespace {

enum Pending { NOTHING, BOTH, MASS };  // A row still has to pass these filters.

// Write a row's guided logits to `out`, -inf where a filter removes them, and return the pending filters. Both are
// pending where a logit is NaN or inf, or all are -inf, top-p where rounding or the order of equal logits could decide.
template <class T>
INLINED Pending filter_row_inlined(
    const T *cond, const T *uncond, float *out, int32_t *keys, float *weights, int size, float cond_factor,
    float uncond_factor, int64_t top_k, bool filters_mass, float tail) {
    const int32_t infinity_key = order_key(INFINITE);
    int32_t highest_key = std::numeric_limits<int32_t>::min();
    int has_nan = 0;
#pragma omp simd reduction(| : has_nan) reduction(max : highest_key)
    for (int v = 0; v < size; ++v) {
        const float x = cond_factor * to_float(cond[v]) - uncond_factor * to_float(uncond[v]);
        out[v] = x;
        keys[v] = order_key(x);
        has_nan |= x != x;
        highest_key = keys[v] > highest_key ? keys[v] : highest_key;
    }
    if (has_nan || highest_key >= infinity_key || highest_key <= order_key(-INFINITE)) return BOTH;

    int32_t threshold = order_key(-INFINITE);
    if (top_k > 0)
        threshold = last_key(
            threshold, highest_key, [&](int32_t key) { return count_reaching(keys, size, key) >= top_k; });
    Pending pending = NOTHING;
    if (filters_mass) {
        const int32_t count_threshold = threshold;
        const float highest_logit = number_of(highest_key);
        double total = 0;
        float lowest = 0;
        int32_t terms = 0;
#pragma omp simd reduction(+ : total, terms) reduction(min : lowest)
        for (int v = 0; v < size; ++v) {
            const bool counts = (keys[v] >= threshold) & (keys[v] > order_key(-INFINITE));
            const float below = out[v] - highest_logit, weight = masked(exponential(below), counts);
            weights[v] = weight;
            total += weight;
            terms += counts;
            const float counted = masked(below, counts);
            lowest = counted < lowest ? counted : lowest;
        }
        // PyTorch's probabilities may have this relative error: 20 ulp from exp, and half an ulp from each addition in
        // one of at least 4 lanes.
        const double error = 6e-6 + 1.5e-8 * terms, removable = tail * total;
        const double most_removable = removable * (1 + error), least_removable = removable * (1 - error);
        threshold = last_key(
            threshold, highest_key, [&](int32_t key) { return mass_below(keys, weights, size, key) <= removable; });
        const double removed = mass_below(keys, weights, size, threshold);
        float weight = 0;
        int32_t equals = 0;
#pragma omp simd reduction(+ : equals) reduction(max : weight)
        for (int v = 0; v < size; ++v) {
            equals += keys[v] == threshold;
            weight = keys[v] == threshold && weights[v] > weight ? weights[v] : weight;
        }
        const bool may_vanish = lowest < -70 && tail < 1e-20;  // Some probability may become 0.
        const bool highest_stays = threshold == highest_key && equals == 1;  // The largest logit always stays.
        const bool may_split_equals = !highest_stays && removed + weight <= most_removable;
        if (may_vanish || (removed > least_removable && removed > 0) || may_split_equals)
            pending = MASS, threshold = count_threshold;
    }
#pragma omp simd
    for (int v = 0; v < size; ++v) out[v] = keys[v] < threshold ? -INFINITE : out[v];
    return pending;
}

FOR_EVERY_PROCESSOR int filter_row(
    const float *cond, const float *uncond, float *out, int32_t *keys, float *weights, int size, float cond_factor,
    float uncond_factor, int64_t top_k, bool filters_mass, float tail) {
    return filter_row_inlined(
        cond, uncond, out, keys, weights, size, cond_factor, uncond_factor, top_k, filters_mass, tail);
}

FOR_EVERY_PROCESSOR int filter_row(
    const bfloat16 *cond, const bfloat16 *uncond, float *out, int32_t *keys, float *weights, int size,
    float cond_factor, float uncond_factor, int64_t top_k, bool filters_mass, float tail) {
    return filter_row_inlined(
        cond, uncond, out, keys, weights, size, cond_factor, uncond_factor, top_k, filters_mass, tail);
}

template <class T>
int filter_rows(
    const T *logits, float *out, uint8_t *pending, int64_t images, int64_t positions, int size, int64_t image_stride,
    int64_t position_stride, float cond_factor, float uncond_factor, int64_t top_k, bool filters_mass, float tail,
    int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        int32_t *keys = new (std::nothrow) int32_t[size];
        float *weights = new (std::nothrow) float[size];
        if (!keys || !weights) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t i = 0; i < images * positions; ++i) {
            if (!keys || !weights) continue;
            const T *cond = logits + i / positions * image_stride + i % positions * position_stride;
            pending[i] = filter_row(
                cond, cond + images * image_stride, out + i * size, keys, weights, size, cond_factor, uncond_factor,
                top_k, filters_mass, tail);
        }
        delete[] keys;
        delete[] weights;
    }
    return failed;
}

// Repeat the layout of PyTorch's CPU generator, a Mersenne twister.
constexpr int WORDS = 624;
struct State {
    uint64_t seed;
    int32_t left, seeded;
    uint64_t next, words[WORDS];
};

struct Engine {
    uint32_t words[WORDS];
    int next;
};

INLINED uint32_t twist(uint32_t first, uint32_t second) {
    return (((first & 0x80000000u) | (second & 0x7fffffffu)) >> 1) ^ (second & 1 ? 0x9908b0dfu : 0u);
}

// Write the next `count` outputs of 32 bits.
FOR_EVERY_PROCESSOR void generate(Engine &engine, uint32_t *to, int64_t count) {
    uint32_t *words = engine.words;
    while (count > 0) {
        if (engine.next == WORDS) {
#pragma omp simd
            for (int i = 0; i < WORDS - 397; ++i) words[i] = words[i + 397] ^ twist(words[i], words[i + 1]);
#pragma omp simd safelen(16)
            for (int i = WORDS - 397; i < WORDS - 1; ++i)
                words[i] = words[i + 397 - WORDS] ^ twist(words[i], words[i + 1]);
            words[WORDS - 1] = words[396] ^ twist(words[WORDS - 1], words[0]);
            engine.next = 0;
        }
        const int length = int(count < WORDS - engine.next ? count : WORDS - engine.next);
        const uint32_t *from = words + engine.next;
#pragma omp simd
        for (int i = 0; i < length; ++i) {
            uint32_t y = from[i];
            y ^= y >> 11;
            y ^= (y << 7) & 0x9d2c5680u;
            y ^= (y << 15) & 0xefc60000u;
            to[i] = y ^ (y >> 18);
        }
        to += length, count -= length, engine.next += length;
    }
}

// Return p / q as PyTorch does, with q from a uniform number of 53 bits.
INLINED float ratio_of(float p, uint32_t upper, uint32_t lower) {
    const uint64_t bits = uint64_t(upper) << 32 | lower;
    const double uniform = (bits & ((uint64_t(1) << 53) - 1)) * (1.0 / (uint64_t(1) << 53));
    return p / float(-std::log1p(-uniform));
}

// Return (upper * 2^32 + lower) / 2^53 with a relative error of 2e-7; upper is at most 2^21.
INLINED float uniform_of(uint32_t upper, uint32_t lower) {
    const float coarse = float(int32_t(lower >> 16)) * 0x1p16f + float(int32_t(lower & 0xffff));
    return float(int32_t(upper)) * 0x1p-21f + coarse * 0x1p-53f;
}

// Return argmax(p / q) over a row, q exponentially distributed, or -1 where p is no probability. `ratios` gets all
// ratios to 2e-6, and ratios near the best are computed again as in PyTorch.
FOR_EVERY_PROCESSOR int64_t draw_token(const float *p, const uint32_t *words, float *ratios, int size) {
    int invalid = 0;
    float best_ratio = 0;
#pragma omp simd reduction(| : invalid) reduction(max : best_ratio)
    for (int v = 0; v < size; ++v) {
        const uint32_t upper = words[2 * v] & 0x1fffff, lower = words[2 * v + 1];
        const uint32_t upper_complement = (~upper & 0x1fffff) + (lower == 0);
        const uint32_t lower_complement = -lower;  // Both complements hold 2^53 - bits.
        const float uniform = uniform_of(upper, lower);
        const float ratio = p[v] / std::fabs(logarithm(uniform_of(upper_complement, lower_complement), -uniform));
        invalid |= !(p[v] >= 0) | !(p[v] < INFINITE);
        ratios[v] = masked(ratio, p[v] > 0);
        best_ratio = ratios[v] > best_ratio ? ratios[v] : best_ratio;
    }
    if (invalid) return -1;

    const float lowest_candidate = best_ratio < 1e-30f ? 0 : best_ratio * (1 - 1e-5f);
    int64_t token = 0;
    best_ratio = -1;
    for (int v = 0; v < size; ++v) {
        if (!(ratios[v] >= lowest_candidate) || p[v] == 0) continue;
        const float ratio = ratio_of(p[v], words[2 * v], words[2 * v + 1]);
        if (ratio > best_ratio) best_ratio = ratio, token = v;
    }
    return token;
}

}  // namespace

extern "C" {

// Guide and filter logits [2 * images, positions, size], conditional half first, into out [images, positions, size],
// and return 0, or 1 when memory ran out. Tokens of logits are neighbours, and other strides are given. pending
// [images, positions] gets each row's pending filters.
int guide_and_filter(
    int is_bfloat16, const void *logits, float *out, uint8_t *pending, int64_t images, int64_t positions, int64_t size,
    int64_t image_stride, int64_t position_stride, float cond_factor, float uncond_factor, int64_t top_k,
    int filters_mass, float tail, int threads) {
    if (is_bfloat16)
        return filter_rows(
            (const bfloat16 *)logits, out, pending, images, positions, size, image_stride, position_stride,
            cond_factor, uncond_factor, top_k, filters_mass, tail, threads);
    return filter_rows(
        (const float *)logits, out, pending, images, positions, size, image_stride, position_stride, cond_factor,
        uncond_factor, top_k, filters_mass, tail, threads);
}

// Draw one token for each row of p [rows, size], advance the generator's state and return 0. Return 1 when memory ran
// out, or 2 where p are no probabilities, without a change of the state.
int draw(const float *p, void *state, int64_t *tokens, int64_t rows, int64_t size, int threads) {
    State &saved = *(State *)state;
    Engine engine;
    for (int i = 0; i < WORDS; ++i) engine.words[i] = uint32_t(saved.words[i]);
    engine.next = saved.left == 1 ? WORDS : int(saved.next);
    const int64_t group = std::max<int64_t>(1, (1 << 17) / size);  // A group's random numbers fit the cache.
    uint32_t *words = new (std::nothrow) uint32_t[2 * size * std::min(group, rows)];
    float *ratios = new (std::nothrow) float[size * threads];
    if (!words || !ratios) {
        delete[] words;
        delete[] ratios;
        return 1;
    }
    int invalid = 0;
#pragma omp parallel num_threads(threads)
    for (int64_t begin = 0; begin < rows; begin += group) {
        const int64_t end = std::min(begin + group, rows);
#pragma omp single
        generate(engine, words, 2 * size * (end - begin));
#pragma omp for reduction(| : invalid)
        for (int64_t i = begin; i < end; ++i) {
            float *thread_ratios = ratios + size * omp_get_thread_num();
            tokens[i] = draw_token(p + i * size, words + 2 * size * (i - begin), thread_ratios, size);
            invalid |= tokens[i] < 0;
        }
    }
    delete[] words;
    delete[] ratios;
    if (invalid) return 2;
    for (int i = 0; i < WORDS; ++i) saved.words[i] = engine.words[i];
    saved.next = engine.next;
    saved.left = WORDS + 1 - engine.next;
    return 0;
}
}
