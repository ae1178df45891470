// Compute attention of the kept tokens over the K/V cache and their own scale on the CPU. Each head goes through QK
// norm, appending to the cache, scores, softmax in float32 and values at once. cpu_kernel.py calls `subset_attention`.

#include "../cpu_backend/brgemm.h"

#include <cstddef>
#include <cstdint>

namespace {

// Locate [sequences, heads, tokens, dim]. A token's numbers are neighbours, and strides count numbers.
struct Rows {
    void *data;
    int64_t sequence, head, token;
};

struct Job {
    Rows q, k, v;                // q of the kept tokens; k and v of the own scale
    Rows keys, values;           // the cache, to which `append` adds k and v
    const float *head_scale;     // [heads], or null without QK norm
    void *out;                   // [sequences, kept, heads, dim]
    int sequences, heads, kept, own, cached, dim, append;
    float scale;
    int brgemm;                  // 1 multiplies by PyTorch's products: bfloat16 in pairs, panels of WIDTH keys
};

constexpr int QUERIES = 48;  // A thread holds the scores of this many queries,
constexpr int MOST_KEYS = 4096;  // for all keys up to this many, beyond them for parts of KEYS.
constexpr int KEYS = 1024;

}  // namespace

#define KERNEL "../subset_attention/cpu_tile.h"
#include "../cpu_backend/isa.h"

namespace {

struct Isa {
    size_t (*bytes[3])(const Job &);
    void (*runs[3])(const Job &, int, int, char *);
};

#define ISA_OF(isa) {FOR_EVERY_KIND(isa::scratch_bytes), FOR_EVERY_KIND(isa::run)},
const Isa ISAS[] = {FOR_EVERY_ISA(ISA_OF)};

Rows rows_of(void *data, const int64_t *strides) { return {data, strides[0], strides[1], strides[2]}; }

}  // namespace

// Attend and return 0, or 1 when memory ran out. `strides` has three numbers each for q, k, v, keys and values.
extern "C" int subset_attention(int isa, int kind, void *q, void *k, void *v, void *keys, void *values,
                                const void *head_scale, void *out, const int64_t *strides, int sequences, int heads,
                                int kept, int own, int cached, int dim, int append, float scale, int brgemm,
                                int threads) {
    const Job job = {rows_of(q, strides), rows_of(k, strides + 3), rows_of(v, strides + 6), rows_of(keys, strides + 9),
                     rows_of(values, strides + 12), (const float *)head_scale, out, sequences, heads, kept, own, cached,
                     dim, append, scale, brgemm};
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        const Scratch scratch(ISAS[isa].bytes[kind](job), failed);
#pragma omp for schedule(dynamic, 1)
        for (int item = 0; item < sequences * heads; item++)
            if (scratch.bytes != nullptr) ISAS[isa].runs[kind](job, item / heads, item % heads, scratch.bytes);
        if (brgemm) BRGEMM.release(true);
    }
    return failed;
}
