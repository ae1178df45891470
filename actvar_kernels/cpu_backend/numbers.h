// Define numbers of 16 bits, and widen those that files read which the compiler vectorizes by itself.

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
INLINED float to_float(bfloat16 x) { return same_bits<float>(uint32_t(x.bits) << 16); }

}  // namespace
