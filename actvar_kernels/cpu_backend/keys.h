// Map floats to integers in the same order, to find the highest by counting, and compile functions per instruction set.

#pragma once

#include <cstdint>
#include <cstring>

// The compiler makes a version of each marked function for every instruction set, and the loader takes the best.
// Functions that a marked function calls have to be inlined.
#if defined(__x86_64__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif
#define INLINED inline __attribute__((always_inline))

namespace {

// Return the number of type To with the bits of x.
template <class To, class From> INLINED To same_bits(From x) {
    To out;
    std::memcpy(&out, &x, sizeof out);
    return out;
}

// Return an integer that orders like x, which is not NaN; 0 and -0 give the same integer.
INLINED int32_t order_key(float x) {
    const int32_t bits = same_bits<int32_t>(x + 0.0f);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Return how many of the keys are at least `key`.
INLINED int64_t count_reaching(const int32_t *keys, int size, int32_t key) {
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int v = 0; v < size; ++v) count += keys[v] >= key;
    return count;
}

// Return the last key of [low, high] for which a condition holds. The condition has to hold for `low`, and for no key
// after one for which it fails.
template <class Condition>
INLINED int32_t last_key(int32_t low, int32_t high, Condition holds) {
    int64_t from = low, to = int64_t(high) + 1;
    while (to - from > 1) {
        const int64_t middle = (from + to) >> 1;
        if (holds(int32_t(middle)))
            from = middle;
        else
            to = middle;
    }
    return int32_t(from);
}

}  // namespace
