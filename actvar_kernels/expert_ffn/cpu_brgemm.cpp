// Compute the expert FFN on the CPU by PyTorch's products, in 16 bits or in bytes. Where experts are skipped, each is a
// matrix of its own: the rows of those tokens that chose it are gathered before it multiplies them, and its results are
// added to the tokens' sums. Otherwise all are one matrix, and hidden units that were not chosen become zeros. Threads
// share hidden units, then columns of the result.

#include "../cpu_backend/brgemm.h"

#include <omp.h>

namespace {

struct Job {
    const void *u;                       // [tokens, channels]
    const uint8_t *mask;                 // [tokens, experts]
    const void *weight1, *weight2;       // panels of columns
    const float *scales1, *scales2;      // [groups, units], [channels] of bytes; like the next two padded to panels
    const int32_t *offsets1, *offsets2;  // [groups, units], [groups, channels], 128 times the sum of a column's bytes
    const float *bias1, *bias2;          // [groups, units], [channels]
    void *out;                           // [tokens, channels]
    int tokens, channels, experts;
    int width;     // hidden units of an expert
    int groups;    // Hidden units are filled up to panels in so many groups: one for an expert, or a single one.
    int matrices;  // the number of experts where they are skipped, otherwise 1
    int units;     // hidden units of a matrix
};

// Hold some of the tokens, and what is computed of them. An entry is a token in the list of a matrix.
struct Chunk {
    int begin;             // the first token
    int stride;            // of `rows`
    const void *rows;      // [tokens, stride], numbers of 16 bits or bytes
    float *scales;         // [tokens] of the rows
    int entries;           // room for so many
    int *starts, *lists;   // [matrices + 1] first entries; [entries] tokens, counted from `begin`
    void *hidden;          // [entries, units]
    uint32_t *highest;     // [units / GROUP, entries], the highest of a group's units; null without bytes
    float *hidden_scales;  // [tokens]
    void *factors;         // [entries, units], the hidden units as they are multiplied
};

constexpr int MAX_CHUNK = 512;  // Most tokens of a chunk.
constexpr int GROUP = 256;      // Most hidden units that a thread computes at once.
constexpr int SPAN = 128;       // Most tokens whose results are summed at once.

}  // namespace

#define KERNEL "../expert_ffn/cpu_brgemm_tile.h"
#include "../cpu_backend/isa.h"

namespace {

struct Kind {
    void (*quantize_token)(const void *, int, int, uint8_t *, float *);
    void (*up)(const Job &, const Chunk &, int, int, int, int, int, void *);
    void (*quantize_entry)(const Job &, const Chunk &, int);
    void (*down)(const Job &, const Chunk &, int, int, int, void *);
};

// Numbers in bytes: float32, bfloat16, float16. As they are: bfloat16, float16.
#define BYTES(isa, T) \
    {isa::quantize_row<T>, isa::up<T, uint8_t, int32_t>, isa::quantize_entry<T>, isa::down<T, uint8_t, int32_t>}
#define HALVES(isa, T) {nullptr, isa::up<T, T, float>, nullptr, isa::down<T, T, float>}
#define KINDS_OF(isa) \
    {BYTES(isa, float), BYTES(isa, bfloat16), BYTES(isa, float16), HALVES(isa, bfloat16), HALVES(isa, float16)},
const Kind ISAS[][5] = {FOR_EVERY_ISA(KINDS_OF)};

// List the tokens of each matrix: those that chose the expert, or all.
void list_tokens(const Job &job, const Chunk &chunk, int count) {
    int entries = 0;
    for (int matrix = 0; matrix < job.matrices; matrix++) {
        chunk.starts[matrix] = entries;
        for (int t = 0; t < count; t++)
            if (job.matrices == 1 || job.mask[(size_t)(chunk.begin + t) * job.experts + matrix]) chunk.lists[entries++] = t;
    }
    chunk.starts[job.matrices] = entries;
}

// Find the scale of each token's hidden units.
void scale_hidden(const Chunk &chunk, int count, int entries, int groups) {
    uint32_t most[MAX_CHUNK] = {};
    for (int group = 0; group < groups; group++)
        for (int entry = 0; entry < entries; entry++) {
            uint32_t &of_token = most[chunk.lists[entry]];
            const uint32_t found = chunk.highest[(size_t)group * chunk.entries + entry];
            if (found > of_token) of_token = found;
        }
    for (int t = 0; t < count; t++) {
        memcpy(chunk.hidden_scales + t, most + t, 4);
        chunk.hidden_scales[t] /= 127;
    }
}

constexpr int PARTS = 9;

// Divide memory for a chunk of `most` tokens and the scratch of all threads into parts, and return its bytes.
size_t divide(const Job &job, int most, int stride, int kind, bool is_int8, size_t scratch, size_t (&parts)[PARTS]) {
    const size_t tokens = most, entries = tokens * job.matrices, groups = (job.units + GROUP - 1) / GROUP;
    const size_t read = entries + 8;  // A product of entries has a multiple of 8 rows.
    const size_t bytes[PARTS] = {is_int8 ? tokens * stride : 0,
                                 4 * tokens,
                                 4 * (size_t)(job.matrices + 1),
                                 4 * entries,
                                 read * job.units * (kind ? 2 : 4),
                                 is_int8 ? 4 * groups * entries : 0,
                                 4 * tokens,
                                 is_int8 ? read * job.units : 0,
                                 scratch};
    size_t all = 0;
    for (int i = 0; i < PARTS; i++) {
        parts[i] = all;
        all += (bytes[i] + 63) / 64 * 64;
    }
    return all;
}

}  // namespace

// Compute the FFN and return 0, or 1 when memory ran out. In 16 bits channels are even; scales and offsets are null.
// `groups` is 1 or the number of experts, the number of matrices where experts are skipped.
extern "C" int brgemm_expert_ffn(int isa, int kind, int is_int8, int skips, const void *u, const void *mask,
                                 const void *weight1, const float *scales1, const int32_t *offsets1, const float *bias1,
                                 const void *weight2, const float *scales2, const int32_t *offsets2, const float *bias2,
                                 void *out, int tokens, int channels, int experts, int width, int groups, int threads) {
    const int units = padded(width * experts / groups, WIDTH);
    const Job job = {u,        (const uint8_t *)mask, weight1, weight2,  scales1, scales2, offsets1, offsets2,
                     bias1,    bias2,                 out,     tokens,   channels, experts,
                     groups == 1 ? width : units, groups, skips ? groups : 1, skips ? units : groups * units};
    const Kind &ops = ISAS[isa][is_int8 ? kind : 2 + kind];
    const int stride = padded(channels, is_int8 ? 4 : 2), panels = padded(channels, WIDTH) / WIDTH;
    const int most = smaller(tokens, MAX_CHUNK), unit_groups = (job.units + GROUP - 1) / GROUP;
    const size_t of_thread = 4 * (BLOCK + SPAN) * WIDTH + (size_t)BLOCK * stride * (is_int8 ? 1 : 2) + 64;
    size_t parts[PARTS];
    char *memory =
        (char *)aligned_alloc(64, divide(job, most, stride, kind, is_int8, of_thread * threads, parts));
    if (memory == nullptr) return 1;
    Chunk chunk = {0,
                   stride,
                   memory + parts[0],
                   (float *)(memory + parts[1]),
                   most * job.matrices,
                   (int *)(memory + parts[2]),
                   (int *)(memory + parts[3]),
                   memory + parts[4],
                   is_int8 ? (uint32_t *)(memory + parts[5]) : nullptr,
                   (float *)(memory + parts[6]),
                   memory + parts[is_int8 ? 7 : 4]};
#pragma omp parallel num_threads(threads) firstprivate(chunk)
    {
        char *scratch = memory + parts[8] + of_thread / 64 * 64 * omp_get_thread_num();
        for (; chunk.begin < tokens; chunk.begin += most) {
            const int count = smaller(tokens - chunk.begin, most), blocks = (count + BLOCK - 1) / BLOCK;
            if (!is_int8) chunk.rows = (const uint16_t *)u + (size_t)chunk.begin * stride;
#pragma omp single nowait
            list_tokens(job, chunk, count);
#pragma omp for
            for (int t = 0; t < count; t++)
                if (is_int8)
                    ops.quantize_token(u, channels, chunk.begin + t, (uint8_t *)chunk.rows + (size_t)t * stride,
                                       chunk.scales + t);
#pragma omp for schedule(dynamic, 1)
            for (int item = 0; item < job.matrices * unit_groups * blocks; item++) {
                const int matrix = item / blocks / unit_groups, column = item / blocks % unit_groups * GROUP;
                const int entry = chunk.starts[matrix] + item % blocks * BLOCK;
                const int rows = smaller(chunk.starts[matrix + 1] - entry, BLOCK);
                if (rows > 0) ops.up(job, chunk, matrix, column, smaller(column + GROUP, job.units), entry, rows, scratch);
            }
            if (is_int8) {
#pragma omp single
                scale_hidden(chunk, count, chunk.starts[job.matrices], unit_groups);
#pragma omp for
                for (int entry = 0; entry < chunk.starts[job.matrices]; entry++) ops.quantize_entry(job, chunk, entry);
            }
            const int spans = (count + SPAN - 1) / SPAN;
#pragma omp for schedule(dynamic, 1)
            for (int item = 0; item < panels * spans; item++) {
                const int from = item % spans * SPAN;
                ops.down(job, chunk, item / spans, from, smaller(count, from + SPAN), scratch);
            }
        }
        BRGEMM.release(true);
    }
    free(memory);
    return 0;
}
