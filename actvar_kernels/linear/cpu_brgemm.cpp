// Compute a linear layer on the CPU by PyTorch's products, in 16 bits or in bytes. Threads share panels of columns and
// blocks of rows. Bytes follow `linear/quantized.py` bit for bit: their sums are exact.

#include "../cpu_backend/brgemm.h"

namespace {

struct Job {
    const void *x;           // [rows, depth]
    const void *weight;      // panels of columns
    const float *scales;     // [columns] of the weight; like the next two padded to a panel
    const int32_t *offsets;  // [columns], 128 times the sum of a column's bytes
    const float *bias;       // [columns]
    void *out;               // [rows, columns]
    int rows, depth, columns;
};

constexpr int CHUNK = 512;  // So many rows are quantized before they are multiplied.

}  // namespace

#define KERNEL "../linear/cpu_brgemm_tile.h"
#include "../cpu_backend/isa.h"

namespace {

struct Isa {
    void (*quantize[3])(const void *, int, int, uint8_t *, float *);
    void (*run_bytes[3])(const Job &, int, int, int, const void *, int, const float *);
    void (*run[3])(const Job &, int, int, int, const void *, int, const float *);
};

#define ISA_OF(isa)                                            \
    {FOR_EVERY_KIND(isa::quantize_row), FOR_EVERY_KIND(isa::run_bytes), \
     {nullptr, isa::run<bfloat16, bfloat16, float>, isa::run<float16, float16, float>}},
const Isa ISAS[] = {FOR_EVERY_ISA(ISA_OF)};

}  // namespace

// Compute the layer and return 0, or 1 when memory ran out. In 16 bits the depth is even; scales and offsets are null.
extern "C" int brgemm_linear(int isa, int kind, int is_int8, const void *x, const void *weight,
                             const float *scales, const int32_t *offsets, const float *bias, void *out, int rows,
                             int depth, int columns, int threads) {
    const Job job = {x, weight, scales, offsets, bias, out, rows, depth, columns};
    const Isa &ops = ISAS[isa];
    const int panels = padded(columns, WIDTH) / WIDTH, stride = is_int8 ? padded(depth, 4) : depth;
    char *scratch = nullptr;  // [CHUNK, stride] bytes, [CHUNK] scales
    const int chunk = smaller(rows, CHUNK);
    if (is_int8) {
        scratch = (char *)aligned_alloc(64, padded(chunk * (stride + 4), 64) + 64);
        if (scratch == nullptr) return 1;
    }
    float *row_scales = (float *)scratch;
    uint8_t *bytes = (uint8_t *)(row_scales + chunk);
#pragma omp parallel num_threads(threads)
    {
        for (int begin = 0; begin < rows; begin += chunk) {
            const int end = smaller(rows, begin + chunk), blocks = (end - begin + BLOCK - 1) / BLOCK;
            if (is_int8) {
#pragma omp for
                for (int row = begin; row < end; row++)
                    ops.quantize[kind](x, depth, row, bytes + (size_t)(row - begin) * stride, row_scales + row - begin);
            }
#pragma omp for schedule(dynamic, 1)
            for (int item = 0; item < panels * blocks; item++) {
                const int row = begin + item % blocks * BLOCK, count = smaller(end - row, BLOCK);
                if (is_int8)
                    ops.run_bytes[kind](job, item / blocks, row, count, bytes + (size_t)(row - begin) * stride,
                                               stride, row_scales + row - begin);
                else
                    ops.run[kind](job, item / blocks, row, count, (const uint16_t *)x + (size_t)row * depth, depth, nullptr);
            }
        }
        BRGEMM.release(true);
    }
    free(scratch);
    return 0;
}
