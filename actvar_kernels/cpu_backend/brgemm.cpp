// Hold PyTorch's products, and tell which of them run on this processor.

#include "brgemm.h"

#include <cstring>

Brgemm BRGEMM = {};

namespace {

// Return whether a product of ones is right. PyTorch raises where oneDNN has no product for the processor.
template <class A, class B, class Sum> bool works(A one, B weight, Sum expected) {
    constexpr int DEPTH = 8;
    A a[DEPTH];
    B panel[DEPTH * WIDTH];
    Sum sums[WIDTH] = {};
    for (A &x : a) x = one;
    for (B &w : panel) w = weight;
    try {
        block_product(1, WIDTH, DEPTH, DEPTH, false, a, panel, sums);
        BRGEMM.release(true);
    } catch (...) {
        return false;
    }
    for (Sum sum : sums)
        if (sum != DEPTH * expected) return false;
    return true;
}

}  // namespace

extern "C" {

void set_brgemm(const void *bfloat16, const void *int8, const void *release) {
    memcpy(&BRGEMM.bfloat16, &bfloat16, sizeof bfloat16);
    memcpy(&BRGEMM.int8, &int8, sizeof int8);
    memcpy(&BRGEMM.release, &release, sizeof release);
}

// Return whether products of bfloat16, or of bytes, run here.
int brgemm_works(int is_int8) {
    const uint16_t one = 0x3f80;
    return is_int8 ? works<uint8_t, int8_t, int32_t>(200, -3, -600) : works<uint16_t, uint16_t, float>(one, one, 1);
}
}
