// Integers in the order of floats, to find the highest by counting; and versions of a function for every instruction set.

#pragma once

#include <cstdint>
#include <cstring>

// The compiler makes a version of each marked function for every instruction set, the loader takes the best. What they
// call has to be inlined into them.
#if defined(__x86_64__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif
#define INLINED inline __attribute__((always_inline))

namespace {

// Integers in the order of the numbers, which are not NaN; equal for 0 and -0.
INLINED int32_t ordered(float x) {
    x += 0.0f;
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

// How many of the keys are at least `key`.
INLINED int64_t reaching(const int32_t *keys, int size, int32_t key) {
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int v = 0; v < size; ++v) count += keys[v] >= key;
    return count;
}

// The largest key from `low` on of which a condition holds that holds of `low`, and of no key after one it does not
// hold of; `high` is a key that bounds it from above.
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
