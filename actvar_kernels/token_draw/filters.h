// Define what the two samplers share: exponential and logarithm in float32, and the weight of a row's lowest tokens.

#pragma once

#include "../cpu_backend/numbers.h"

#include <limits>

namespace {

const float INFINITE = std::numeric_limits<float>::infinity();

// Return exp(x) for x <= 0 with a relative error of 1e-7; an x below -87 counts as -87.
INLINED float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // The sums round to an integer.
    const float r = x - n * 0.693145752f - n * 1.42860677e-6f;
    float p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * same_bits<float>((int32_t(n) + 127) << 23);
}

// Return log(x) for 0 < x <= 1 with a relative error of 2e-7 (Cephes logf). `minus_1` is x - 1, perhaps more exact.
INLINED float logarithm(float x, float minus_1) {
    const int32_t bits = same_bits<int32_t>(x);
    const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // The mantissa will be in [sqrt(1/2), sqrt(2)).
    const float mantissa = same_bits<float>(bits - exponent * (1 << 23));
    const float f = exponent == 0 ? minus_1 : mantissa - 1.0f, square = f * f, n = float(exponent);
    float p = 7.0376836292e-2f * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    return f + (p * f * square - 0.5f * square + n * -2.12194440e-4f) + n * 0.693359375f;
}

INLINED float masked(float x, bool stays) {  // Selecting bits needs no branch.
    return same_bits<float>(same_bits<int32_t>(x) & -int32_t(stays));
}

// Return the number whose `order_key` is key.
INLINED float number_of(int32_t key) { return same_bits<float>(key ^ ((key >> 31) & 0x7fffffff)); }

INLINED double mass_below(const int32_t *keys, const float *weights, int size, int32_t key) {
    double mass = 0;
#pragma omp simd reduction(+ : mass)
    for (int v = 0; v < size; ++v) mass += masked(weights[v], keys[v] < key);
    return mass;
}

}  // namespace
