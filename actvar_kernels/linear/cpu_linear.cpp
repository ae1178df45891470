// A linear layer on the CPU whose weight is packed once: column panels go over the rows while they are in the cache, and
// threads share the panels, so that few rows read every weight once. cpu_kernel.py packs the weights.

namespace {

struct Job {
    const void *x;       // [rows, depth]
    const void *weight;  // panels of columns
    const float *bias;   // [columns], padded to a vector
    void *out;           // [rows, columns]
    int rows, depth, columns;
};

}  // namespace

#define KERNEL "linear/cpu_tile.h"
#include "../cpu_levels.h"

namespace {

typedef void (*Run)(const Job &, int, int, int, int);

#define RUNS_OF(level) {level::run<float>, level::run<bfloat16>},
const Run RUNS[][2] = {FOR_EVERY_LEVEL(RUNS_OF)};
#define PANEL_OF(level) level::PANEL,
const int PANELS[] = {FOR_EVERY_LEVEL(PANEL_OF)};

}  // namespace

extern "C" void linear(int level, int is_bfloat16, const void *x, const void *weight, const void *bias, void *out,
                       int rows, int depth, int columns, int threads) {
    const Job job = {x, weight, (const float *)bias, out, rows, depth, columns};
    const Run run = RUNS[level][is_bfloat16];
    const int most = 512;  // rows that go over a panel, so that they stay in the cache for the next one
    const int panels = padded(columns, PANELS[level]) / PANELS[level], chunks = (rows + most - 1) / most;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t item = 0; item < (int64_t)panels * chunks; item++) {
        const int64_t chunk = item / panels;
        run(job, item % panels, (item + threads) % panels, rows * chunk / chunks, rows * (chunk + 1) / chunks);
    }
}
