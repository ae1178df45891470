// Compute a linear layer on the CPU with a weight that cpu_kernel.py packs once. Rows go over a panel of columns while
// it is in the cache. Threads share the panels, so that few rows read every weight once.

namespace {

struct Job {
    const void *x;       // [rows, depth]
    const void *weight;  // panels of columns, or [columns, depth] where it is not packed
    const float *bias;   // [columns], padded to a vector
    void *out;           // [rows, columns]
    int rows, depth, columns;
};

constexpr int FEW_ROWS = 8;  // A weight may stay unpacked up to this many rows.

}  // namespace

#define KERNEL "../linear/cpu_tile.h"
#include "../cpu_backend/isa.h"

namespace {

struct Isa {
    size_t (*scratch_bytes[3])(const Job &, int);
    void (*pack[3])(const Job &, int, int, char *);
    void (*run[3])(const Job &, int, int, int, int, char *);
    void (*run_unpacked[3])(const Job &, int);
    int factor_bytes[3], panel;
};

#define ISA_OF(isa)                                                                          \
    {FOR_EVERY_KIND(isa::scratch_bytes), FOR_EVERY_KIND(isa::pack), FOR_EVERY_KIND(isa::run), \
     FOR_EVERY_KIND(isa::run_unpacked), FOR_EVERY_KIND(isa::FACTOR_BYTES), isa::PANEL},
const Isa ISAS[] = {FOR_EVERY_ISA(ISA_OF)};

}  // namespace

// Compute the layer and return 0, or 1 when memory ran out.
extern "C" int linear(int isa, int kind, const void *x, const void *weight, const void *bias, void *out, int rows,
                      int depth, int columns, int threads) {
    const Job job = {x, weight, (const float *)bias, out, rows, depth, columns};
    const Isa &ops = ISAS[isa];
    const int panels = padded(columns, ops.panel) / ops.panel;
    // The rows of a chunk are whole tiles that stay in the second-level cache for the next panel.
    const int fitting_rows = (256 << 10) / (depth * ops.factor_bytes[kind]) / 12 * 12;
    const int chunk_rows = fitting_rows < 12 ? 12 : fitting_rows;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        const Scratch scratch(ops.scratch_bytes[kind](job, smaller(rows, chunk_rows)), failed);
        int64_t packed_chunk = -1;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < (int64_t)panels * ((rows + chunk_rows - 1) / chunk_rows); item++) {
            if (scratch.bytes == nullptr) continue;
            const int64_t chunk = item / panels;
            const int begin = chunk * chunk_rows, end = smaller(rows, begin + chunk_rows);
            if (chunk != packed_chunk) ops.pack[kind](job, begin, end, scratch.bytes);
            packed_chunk = chunk;
            ops.run[kind](job, item % panels, (item + threads) % panels, begin, end, scratch.bytes);
        }
    }
    return failed;
}

// Compute the layer for at most FEW_ROWS rows with a weight that is not packed; depth is a multiple of 32.
extern "C" void unpacked_linear(int isa, int kind, const void *x, const void *weight, const void *bias, void *out,
                                int rows, int depth, int columns, int threads) {
    const Job job = {x, weight, (const float *)bias, out, rows, depth, columns};
#pragma omp parallel for num_threads(threads)
    for (int column = 0; column < columns; column += 2) ISAS[isa].run_unpacked[kind](job, column);
}
