// A linear layer on the CPU whose weight is packed once: column panels go over the rows while they are in the cache, and
// threads share the panels, so that few rows read every weight once. cpu_kernel.py packs the weights.

namespace {

struct Job {
    const void *x;       // [rows, depth]
    const void *weight;  // panels of columns; unpacked: [columns, depth]
    const float *bias;   // [columns], padded to a vector
    void *out;           // [rows, columns]
    int rows, depth, columns;
};

constexpr int FEW = 8;  // rows for which a weight may stay as it is

}  // namespace

#define KERNEL "../linear/cpu_tile.h"
#include "../cpu_backend/isa.h"

namespace {

struct Isa {
    size_t (*scratch_bytes[2])(const Job &, int);  // float32, bfloat16
    void (*pack[2])(const Job &, int, int, char *);
    void (*run[2])(const Job &, int, int, int, int, char *);
    void (*run_unpacked[2])(const Job &, int);
    int panel;
};

#define ISA_OF(isa)                                             \
    {{isa::scratch_bytes<float>, isa::scratch_bytes<bfloat16>}, \
     {isa::pack<float>, isa::pack<bfloat16>},                   \
     {isa::run<float>, isa::run<bfloat16>},                     \
     {isa::run_unpacked<float>, isa::run_unpacked<bfloat16>},   \
     isa::PANEL},
const Isa ISAS[] = {FOR_EVERY_ISA(ISA_OF)};

}  // namespace

// 0, or 1 when memory ran out.
extern "C" int linear(int isa, int is_bfloat16, const void *x, const void *weight, const void *bias, void *out, int rows,
                      int depth, int columns, int threads) {
    const Job job = {x, weight, (const float *)bias, out, rows, depth, columns};
    const Isa &l = ISAS[isa];
    const int panels = padded(columns, l.panel) / l.panel;
    // rows that go over a panel: whole tiles that stay in the second-level cache for the next one
    const int fitting = (256 << 10) / (depth * (is_bfloat16 ? 2 : 4)) / 12 * 12, most = fitting < 12 ? 12 : fitting;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        char *scratch = (char *)aligned_alloc(64, (l.scratch_bytes[is_bfloat16](job, smaller(rows, most)) + 63) / 64 * 64);
        if (scratch == nullptr) {
#pragma omp atomic write
            failed = 1;
        }
        int64_t packed = -1;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < (int64_t)panels * ((rows + most - 1) / most); item++) {
            if (scratch == nullptr) continue;
            const int64_t chunk = item / panels;
            const int begin = chunk * most, end = smaller(rows, begin + most);
            if (chunk != packed) l.pack[is_bfloat16](job, begin, end, scratch);
            packed = chunk;
            l.run[is_bfloat16](job, item % panels, (item + threads) % panels, begin, end, scratch);
        }
        free(scratch);
    }
    return failed;
}

// The layer of at most FEW rows, on a weight that is not packed; depth is a multiple of 32.
extern "C" void unpacked_linear(int isa, int is_bfloat16, const void *x, const void *weight, const void *bias, void *out,
                                int rows, int depth, int columns, int threads) {
    const Job job = {x, weight, (const float *)bias, out, rows, depth, columns};
#pragma omp parallel for num_threads(threads)
    for (int column = 0; column < columns; column += 2) ISAS[isa].run_unpacked[is_bfloat16](job, column);
}
