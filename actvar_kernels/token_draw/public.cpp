// Drawing tokens as the public code does with PyTorch, on the CPU: guidance and the two filters of one position in a few
// passes over its row, and the draw of `torch.multinomial` from the same random numbers. cpu_public.py calls `guide_and_filter`
// and `draw`. Compiled without contraction of products and sums: the guided logits are PyTorch's bit for bit.

#include "filters.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <omp.h>

namespace {

enum Left { NOTHING, BOTH, MASS };  // filters that a row is still to go through

// Guided logits of a row in `out`, -inf where the filters remove them. Both are left where the logits are not all finite,
// top-p where rounding or the order of equal logits could decide what it removes.
template <class T>
INLINED Left row(
    const T *cond, const T *uncond, float *out, int32_t *keys, float *weights, int size, float cond_factor,
    float uncond_factor, int64_t top_k, bool filters_mass, float tail) {
    const int32_t infinite = ordered(INFINITE);
    int32_t highest = std::numeric_limits<int32_t>::min();
    int strange = 0;
#pragma omp simd reduction(| : strange) reduction(max : highest)
    for (int v = 0; v < size; ++v) {
        const float x = cond_factor * to_float(cond[v]) - uncond_factor * to_float(uncond[v]);
        out[v] = x;
        keys[v] = ordered(x);
        strange |= x != x;
        highest = keys[v] > highest ? keys[v] : highest;
    }
    if (strange || highest >= infinite || highest <= ordered(-INFINITE)) return BOTH;

    int32_t threshold = ordered(-INFINITE);
    if (top_k > 0) threshold = last_key(threshold, highest, [&](int32_t key) { return reaching(keys, size, key) >= top_k; });
    Left left = NOTHING;
    if (filters_mass) {
        const int32_t of_count = threshold;
        const float top = number_of(highest);
        double total = 0;
        float lowest = 0;
        int32_t terms = 0;
#pragma omp simd reduction(+ : total, terms) reduction(min : lowest)
        for (int v = 0; v < size; ++v) {
            const bool counts = (keys[v] >= threshold) & (keys[v] > ordered(-INFINITE));
            const float below = out[v] - top, weight = masked(exponential(below), counts);
            weights[v] = weight;
            total += weight;
            terms += counts;
            const float counted = masked(below, counts);
            lowest = counted < lowest ? counted : lowest;
        }
        // what a probability in PyTorch may be off by, relatively: exp by 20 ulp, and its sum by half an ulp for each
        // addition, which are spread over 4 or more lanes
        const double error = 6e-6 + 1.5e-8 * terms, removable = tail * total;
        const double most = removable * (1 + error), least = removable * (1 - error);
        threshold = last_key(
            threshold, highest, [&](int32_t key) { return mass_below(keys, weights, size, key) <= removable; });
        const double removed = mass_below(keys, weights, size, threshold);
        float weight = 0;
        int32_t equals = 0;
#pragma omp simd reduction(+ : equals) reduction(max : weight)
        for (int v = 0; v < size; ++v) {
            equals += keys[v] == threshold;
            weight = keys[v] == threshold && weights[v] > weight ? weights[v] : weight;
        }
        const bool vanishing = lowest < -70 && tail < 1e-20;      // probabilities that may become 0
        const bool stays = threshold == highest && equals == 1;  // the largest logit always does
        const bool some_of_equals = !stays && removed + weight <= most;
        if (vanishing || (removed > least && removed > 0) || some_of_equals) left = MASS, threshold = of_count;
    }
#pragma omp simd
    for (int v = 0; v < size; ++v) out[v] = keys[v] < threshold ? -INFINITE : out[v];
    return left;
}

FOR_EVERY_PROCESSOR int row_of(
    const float *cond, const float *uncond, float *out, int32_t *keys, float *weights, int size, float cond_factor,
    float uncond_factor, int64_t top_k, bool filters_mass, float tail) {
    return row(cond, uncond, out, keys, weights, size, cond_factor, uncond_factor, top_k, filters_mass, tail);
}

FOR_EVERY_PROCESSOR int row_of(
    const bfloat16 *cond, const bfloat16 *uncond, float *out, int32_t *keys, float *weights, int size,
    float cond_factor, float uncond_factor, int64_t top_k, bool filters_mass, float tail) {
    return row(cond, uncond, out, keys, weights, size, cond_factor, uncond_factor, top_k, filters_mass, tail);
}

template <class T>
int rows(
    const T *logits, float *out, uint8_t *left, int64_t images, int64_t positions, int size, int64_t image_stride,
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
            left[i] = row_of(
                cond, cond + images * image_stride, out + i * size, keys, weights, size, cond_factor, uncond_factor,
                top_k, filters_mass, tail);
        }
        delete[] keys;
        delete[] weights;
    }
    return failed;
}

// PyTorch's Mersenne twister, as it lies in the state of a CPU generator.
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

INLINED uint32_t twisted(uint32_t first, uint32_t second) {
    return (((first & 0x80000000u) | (second & 0x7fffffffu)) >> 1) ^ (second & 1 ? 0x9908b0dfu : 0u);
}

// The next `count` outputs of 32 bits.
FOR_EVERY_PROCESSOR void outputs(Engine &engine, uint32_t *to, int64_t count) {
    uint32_t *words = engine.words;
    while (count > 0) {
        if (engine.next == WORDS) {
#pragma omp simd
            for (int i = 0; i < WORDS - 397; ++i) words[i] = words[i + 397] ^ twisted(words[i], words[i + 1]);
#pragma omp simd safelen(16)
            for (int i = WORDS - 397; i < WORDS - 1; ++i)
                words[i] = words[i + 397 - WORDS] ^ twisted(words[i], words[i + 1]);
            words[WORDS - 1] = words[396] ^ twisted(words[WORDS - 1], words[0]);
            engine.next = 0;
        }
        const int taken = int(count < WORDS - engine.next ? count : WORDS - engine.next);
        const uint32_t *from = words + engine.next;
#pragma omp simd
        for (int i = 0; i < taken; ++i) {
            uint32_t y = from[i];
            y ^= y >> 11;
            y ^= (y << 7) & 0x9d2c5680u;
            y ^= (y << 15) & 0xefc60000u;
            to[i] = y ^ (y >> 18);
        }
        to += taken, count -= taken, engine.next += taken;
    }
}

INLINED float ratio_of(float p, uint32_t upper, uint32_t lower) {  // p / q of a uniform number of 53 bits, as PyTorch's
    const uint64_t bits = uint64_t(upper) << 32 | lower;
    const double uniform = (bits & ((uint64_t(1) << 53) - 1)) * (1.0 / (uint64_t(1) << 53));
    return p / float(-std::log1p(-uniform));
}

INLINED float of_bits(uint32_t upper, uint32_t lower) {  // (upper * 2^32 + lower) / 2^53, upper <= 2^21, to 2e-7 of itself
    const float coarse = float(int32_t(lower >> 16)) * 0x1p16f + float(int32_t(lower & 0xffff));
    return float(int32_t(upper)) * 0x1p-21f + coarse * 0x1p-53f;
}

// The winner of argmax(p / q) over a row, q exponentially distributed; -1 where p is no probability. All ratios are
// computed to 2e-6 in `ratios`, and those near the best one as PyTorch does.
FOR_EVERY_PROCESSOR int64_t winner(const float *p, const uint32_t *words, float *ratios, int size) {
    int invalid = 0;
    float best = 0;
#pragma omp simd reduction(| : invalid) reduction(max : best)
    for (int v = 0; v < size; ++v) {
        const uint32_t upper = words[2 * v] & 0x1fffff, lower = words[2 * v + 1];
        const uint32_t rest = (~upper & 0x1fffff) + (lower == 0), missing = -lower;  // of 2^53 - bits
        const float uniform = of_bits(upper, lower);
        const float ratio = p[v] / std::fabs(logarithm(of_bits(rest, missing), -uniform));
        invalid |= !(p[v] >= 0) | !(p[v] < INFINITE);
        ratios[v] = masked(ratio, p[v] > 0);
        best = ratios[v] > best ? ratios[v] : best;
    }
    if (invalid) return -1;

    const float candidates = best < 1e-30f ? 0 : best * (1 - 1e-5f);
    int64_t token = 0;
    best = -1;
    for (int v = 0; v < size; ++v) {
        if (!(ratios[v] >= candidates) || p[v] == 0) continue;
        const float ratio = ratio_of(p[v], words[2 * v], words[2 * v + 1]);
        if (ratio > best) best = ratio, token = v;
    }
    return token;
}

}  // namespace

extern "C" {

// logits [2 * images, positions, size], conditional half first, with neighbouring tokens and the given strides; out
// [images, positions, size]; doubtful [images, positions]: 1 where only the guidance was done. Returns 0, or 1 when there
// was no memory.
int guide_and_filter(
    int is_bfloat16, const void *logits, float *out, uint8_t *left, int64_t images, int64_t positions, int64_t size,
    int64_t image_stride, int64_t position_stride, float cond_factor, float uncond_factor, int64_t top_k,
    int filters_mass, float tail, int threads) {
    if (is_bfloat16)
        return rows(
            (const bfloat16 *)logits, out, left, images, positions, size, image_stride, position_stride,
            cond_factor, uncond_factor, top_k, filters_mass, tail, threads);
    return rows(
        (const float *)logits, out, left, images, positions, size, image_stride, position_stride, cond_factor,
        uncond_factor, top_k, filters_mass, tail, threads);
}

// One token for each of the rows of p [rows, size] with the generator's state, which moves on. Returns 0; 1 when there
// was no memory, or 2 when p are no probabilities, and the state is as it was.
int draw(const float *p, void *state, int64_t *tokens, int64_t rows, int64_t size, int threads) {
    State &saved = *(State *)state;
    Engine engine;
    for (int i = 0; i < WORDS; ++i) engine.words[i] = uint32_t(saved.words[i]);
    engine.next = saved.left == 1 ? WORDS : int(saved.next);
    const int64_t group = std::max<int64_t>(1, (1 << 17) / size);  // rows whose random numbers fit the cache
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
        outputs(engine, words, 2 * size * (end - begin));
#pragma omp for reduction(| : invalid)
        for (int64_t i = begin; i < end; ++i) {
            float *of_thread = ratios + size * omp_get_thread_num();
            tokens[i] = winner(p + i * size, words + 2 * size * (i - begin), of_thread, size);
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
