// Define a linear layer on PyTorch's products for one instruction set. ../cpu_backend/isa.h includes this file after
// vectors.h.

#include "../cpu_backend/quantize_tile.h"

namespace NAMESPACE {

// Return a sum of products, of which `scale` belongs to the row: bytes are 128 too high, so an offset per column is.
inline vec total(const Job &, int, float, const float *sums) { return load<vec>(sums); }
inline vec total(const Job &job, int column, float scale, const int32_t *sums) {
    const vec exact = __builtin_convertvector(load<ivec>(sums) - load<ivec>(job.offsets + column), vec);
    return rounded_product(exact * load<vec>(job.scales + column), vec{} + scale);
}

// Compute the columns of a panel for `count` rows of `a` [count, stride], rows of the job from `row` on.
template <class T, class A, class Sum>
void run(const Job &job, int panel, int row, int count, const void *a, int stride, const float *scales) {
    alignas(64) Sum sums[BLOCK * WIDTH];
    const int column = panel * WIDTH, columns = smaller(job.columns - column, WIDTH);
    const char *weight = (const char *)job.weight + (size_t)column * stride * sizeof(A);
    block_product(count, padded(columns, 16), stride, stride, false, (const A *)a, weight, sums);
    for (int i = 0; i < count; i++) {
        T *out = (T *)job.out + (size_t)(row + i) * job.columns + column;
        for (int c = 0; c < columns; c += LANES)
            put_columns(out + c,
                        total(job, column + c, scales ? scales[i] : 1, sums + i * WIDTH + c) + load<vec>(job.bias + column + c),
                        columns - c);
    }
}
template <class T>
void run_bytes(const Job &job, int panel, int row, int count, const void *a, int stride, const float *scales) {
    run<T, uint8_t, int32_t>(job, panel, row, count, a, stride, scales);
}

}  // namespace NAMESPACE
