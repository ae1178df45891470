// Hold PyTorch's products, and tell which of them run on this processor.

#include "brgemm.h"

#include <cstring>

Brgemm BRGEMM = {};

namespace {

// Return whether a product is right: rows whose first number is `one` by a panel whose first row is `weight`, which lies
// `STEP` numbers apart. PyTorch raises where oneDNN has no product for the processor.
template <int STEP, class A, class B, class Sum> bool works(A one, B weight, Sum expected) {
    constexpr int DEPTH = 8;
    A a[DEPTH] = {one};
    B panel[DEPTH * WIDTH] = {};
    Sum sums[WIDTH] = {};
    for (int column = 0; column < WIDTH; column++) panel[column * STEP] = weight;
    try {
        block_product(1, WIDTH, DEPTH, DEPTH, false, a, panel, sums);
        BRGEMM.release(true);
    } catch (...) {
        return false;
    }
    for (Sum sum : sums)
        if (sum != expected) return false;
    return true;
}

}  // namespace

extern "C" {

void set_brgemm(const void *int8, const void *bfloat16, const void *float16, const void *release) {
    memcpy(&BRGEMM.int8, &int8, sizeof int8);
    memcpy(&BRGEMM.bfloat16, &bfloat16, sizeof bfloat16);
    memcpy(&BRGEMM.float16, &float16, sizeof float16);
    memcpy(&BRGEMM.release, &release, sizeof release);
}

// Return whether products run here: of bytes (0), of bfloat16 (1), or of float16 (2).
int brgemm_works(int kind) {
    if (kind == 0) return works<4, uint8_t, int8_t, int32_t>(200, -3, -600);
    return kind == 1 ? works<2>(bfloat16{0x3f80}, bfloat16{0x4000}, 2.0f) : works<2>(float16{0x3c00}, float16{0x4000}, 2.0f);
}
}
