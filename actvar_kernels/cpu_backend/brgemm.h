// Multiply rows by panels of weights with at::native::cpublas::brgemm, PyTorch's door to the products of oneDNN, which
// fit the processor. brgemm.py finds the functions in PyTorch's library, so that nothing is compiled against it.

#include "numbers.h"

template <class Sum>
using BlockProduct = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const void *, const void *, Sum *, bool);
struct Brgemm {
    BlockProduct<int32_t> int8;
    BlockProduct<float> bfloat16, float16;
    void (*release)(bool);  // Ends a thread's work.
};
extern Brgemm BRGEMM;

constexpr int WIDTH = 64;  // Columns of a panel, padded with zeros.
constexpr int BLOCK = 64;  // Most rows of a product.

// Multiply `count` rows of `a`, `stride` numbers apart, by a panel [depth / 2, WIDTH, 2] of numbers of 16 bits, and store
// or add the first columns in `sums` [count, WIDTH].
inline void block_product(int count, int columns, int depth, int stride, bool add, const bfloat16 *a, const void *panel,
                          float *sums) {
    BRGEMM.bfloat16(count, columns, depth, stride, WIDTH, WIDTH, add, a, panel, sums, true);
}
inline void block_product(int count, int columns, int depth, int stride, bool add, const float16 *a, const void *panel,
                          float *sums) {
    BRGEMM.float16(count, columns, depth, stride, WIDTH, WIDTH, add, a, panel, sums, true);
}

// Do the same for bytes that are 128 too high, and a panel [depth / 4, WIDTH, 4] of signed bytes.
inline void block_product(int count, int columns, int depth, int stride, bool add, const uint8_t *a, const void *panel,
                          int32_t *sums) {
    BRGEMM.int8(count, columns, depth, stride, WIDTH, WIDTH, add, a, panel, sums, true);
}
