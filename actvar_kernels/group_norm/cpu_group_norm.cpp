// Compute GroupNorm and SiLU on the CPU in two passes over images that lie pixel by pixel. The first gives mean and
// variance of each group, the second the result, which may overwrite x. Sums of chunks are added in order.

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace {

struct Job {
    const void *x;  // [images, pixels, channels]
    void *out;      // [images, pixels, channels]
    int64_t pixels;
    int channels, groups, silu;
};

constexpr int CHUNK = 64;  // A chunk has this many pixels.

struct Chunk {
    int64_t image, first;
    int count;
};

struct Moments {  // Hold the sums of a group's numbers and squares in a chunk.
    double sum, squares;
};

}  // namespace

#define KERNEL "../group_norm/cpu_tile.h"
#include "../cpu_backend/isa.h"

namespace {

struct Isa {
    void (*moments[3])(const Job &, const Chunk &, Moments *);
    void (*normalize[3])(const Job &, const Chunk &, const float *, const float *, const float *);
};

#define ISA_OF(isa) {FOR_EVERY_KIND(isa::moments), FOR_EVERY_KIND(isa::normalize)},
const Isa ISAS[] = {FOR_EVERY_ISA(ISA_OF)};

}  // namespace

// Normalize x and return 0, or 1 when memory ran out. Channels are a multiple of 16.
extern "C" int group_norm_silu(int isa, int kind, const void *x, const float *weight, const float *bias, void *out,
                               int images, int pixels, int channels, int groups, int silu, float eps, int threads) {
    const Job job = {x, out, pixels, channels, groups, silu};
    const Isa &ops = ISAS[isa];
    const int64_t chunks = (pixels + CHUNK - 1) / CHUNK, items = images * chunks;
    Moments *moments = (Moments *)malloc(items * groups * sizeof(Moments));
    float *means = (float *)malloc(2 * (size_t)images * channels * sizeof(float));
    float *factors = means + (size_t)images * channels;
    const auto chunk_of = [&](int64_t item) {
        const int64_t first = item % chunks * CHUNK;
        return Chunk{item / chunks, first, smaller(CHUNK, int(pixels - first))};
    };
    if (moments != nullptr && means != nullptr) {
#pragma omp parallel num_threads(items == 1 ? 1 : threads)
        {
#pragma omp for
            for (int64_t item = 0; item < items; item++)
                ops.moments[kind](job, chunk_of(item), moments + item * groups);
#pragma omp for
            for (int64_t group = 0; group < (int64_t)images * groups; group++) {
                const int64_t image = group / groups, width = channels / groups, from = group % groups * width;
                const double count = double(pixels) * width;
                double sum = 0, squares = 0;
                for (int64_t item = image * chunks; item < (image + 1) * chunks; item++) {
                    sum += moments[item * groups + group % groups].sum;
                    squares += moments[item * groups + group % groups].squares;
                }
                const double mean = sum / count, variance = squares / count - mean * mean;
                for (int64_t c = from; c < from + width; c++) {
                    means[image * channels + c] = mean;
                    factors[image * channels + c] = weight[c] / std::sqrt((variance > 0 ? variance : 0) + eps);
                }
            }
#pragma omp for
            for (int64_t i = 0; i < items; i++) {  // The last chunks come first, since they are in the cache.
                const Chunk chunk = chunk_of(items - 1 - i);
                const int64_t from = chunk.image * channels;
                ops.normalize[kind](job, chunk, means + from, factors + from, bias);
            }
        }
    }
    const int failed = moments == nullptr || means == nullptr;
    free(moments);
    free(means);
    return failed;
}
