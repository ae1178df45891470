// Define numbers of 16 bits, and convert those that files read which the compiler vectorizes by itself.

#pragma once

#include "keys.h"

namespace {

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

INLINED float to_float(float x) { return x; }
INLINED float to_float(bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

template <class T>
INLINED T rounded(float x);
template <>
INLINED float rounded<float>(float x) { return x; }
template <>
INLINED bfloat16 rounded<bfloat16>(float x) {  // Ties go to even; NaN stays NaN.
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return bfloat16{uint16_t(x != x ? 0x7fc0 : nearest)};
}

}  // namespace
