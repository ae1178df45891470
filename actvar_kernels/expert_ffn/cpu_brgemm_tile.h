// Define the expert FFN on PyTorch's products for one instruction set. ../cpu_backend/isa.h includes this file after
// vectors.h.

#include "../cpu_backend/quantize_tile.h"

namespace NAMESPACE {

// Return LANES sums of products as numbers. `scale` is that of the row, where there is one.
inline vec number(const float *sums, const float *, float) { return load<vec>(sums); }
inline vec number(const int32_t *sums, const float *scales, float scale) {
    return rounded_product(__builtin_convertvector(load<ivec>(sums), vec) * load<vec>(scales), vec{} + scale);
}

// Add `sign` times the offsets of a panel to sums; bytes alone have offsets.
inline void add_offsets(int32_t *sums, const int32_t *offsets, int sign) {
    for (int c = 0; c < WIDTH; c += LANES) store(sums + c, load<ivec>(sums + c) + sign * load<ivec>(offsets + c));
}
inline void add_offsets(float *, const int32_t *, int) {}

template <class Sum> inline void add_row(Sum *sums, const Sum *row) {
    typedef Sum sumvec __attribute__((vector_size(4 * LANES)));
    for (int c = 0; c < WIDTH; c += LANES) store(sums + c, load<sumvec>(sums + c) + load<sumvec>(row + c));
}

inline bool is_range(const int *list, int count) { return list[count - 1] - list[0] == count - 1; }

// Compute hidden units of a matrix, columns [column, to), for `count` of the chunk's tokens, as entries from `entry` on.
// Units of experts that a token did not choose become zeros.
template <class T, class A, class Sum>
void up(const Job &job, const Chunk &chunk, int matrix, int column, int to, int entry, int count, void *scratch) {
    const int *list = chunk.lists + entry, stride = chunk.stride;
    const bool in_place = is_range(list, count);
    Sum *sums = (Sum *)scratch;  // [BLOCK, WIDTH]
    A *gathered = (A *)(sums + BLOCK * WIDTH);
    for (int i = 0; i < count && !in_place; i++)
        memcpy(gathered + (size_t)i * stride, (const A *)chunk.rows + (size_t)list[i] * stride, stride * sizeof(A));
    const A *rows = in_place ? (const A *)chunk.rows + (size_t)list[0] * stride : gathered;
    const int begin = column;
    for (; column < to; column += WIDTH) {
        const size_t at = (size_t)matrix * job.units + column;
        block_product(in_place ? count : padded(count, 8), WIDTH, stride, stride, false, rows,
                      (const char *)job.weight1 + at * stride * sizeof(A), sums);
        for (int i = 0; i < count; i++) {
            T *hidden = (T *)chunk.hidden + (size_t)(entry + i) * job.units + column;
            add_offsets(sums + i * WIDTH, job.offsets1 + at, -1);
            for (int c = 0; c < WIDTH; c += LANES) {
                const vec y = number(sums + i * WIDTH + c, job.scales1 + at + c, chunk.scales[list[i]]);
                put(hidden + c, gelu(y + load<vec>(job.bias1 + at + c)));
            }
        }
    }
    for (int i = 0; i < count; i++) {
        T *hidden = (T *)chunk.hidden + (size_t)(entry + i) * job.units;
        const uint8_t *mask = job.mask + (size_t)(chunk.begin + list[i]) * job.experts;
        for (int unit = begin; unit < to && job.matrices == 1; ) {
            const int expert = unit / job.width, end = smaller(to, (expert + 1) * job.width);
            if (expert < job.experts && !mask[expert]) memset(hidden + unit, 0, (end - unit) * sizeof(T));
            unit = expert < job.experts ? end : to;
        }
        if (chunk.highest) chunk.highest[begin / GROUP * chunk.entries + entry + i] = highest(hidden + begin, to - begin);
    }
}

// Quantize entry `entry` of the hidden units.
template <class T> void quantize_entry(const Job &job, const Chunk &chunk, int entry) {
    quantize((const T *)chunk.hidden + (size_t)entry * job.units, job.units, chunk.hidden_scales[chunk.lists[entry]],
             (uint8_t *)chunk.factors + (size_t)entry * job.units);
}

// Compute a panel of the result for the chunk's tokens [from, to), at most SPAN.
template <class T, class A, class Sum>
void down(const Job &job, const Chunk &chunk, int panel, int from, int to, void *scratch) {
    const int column = panel * WIDTH, columns = smaller(job.channels - column, WIDTH);
    const int units = job.units, channels = padded(job.channels, WIDTH);
    Sum *part = (Sum *)scratch, *sums = part + BLOCK * WIDTH;  // [BLOCK, WIDTH], [SPAN, WIDTH]
    memset(sums, 0, WIDTH * sizeof(Sum));
    for (int matrix = 0; matrix < job.groups; matrix++)
        add_offsets(sums, job.offsets2 + (size_t)matrix * channels + column, -1);
    for (int t = from + 1; t < to; t++) memcpy(sums + (size_t)(t - from) * WIDTH, sums, WIDTH * sizeof(Sum));
    for (int matrix = 0; matrix < job.matrices; matrix++) {
        const int32_t *offsets = job.offsets2 + (size_t)matrix * channels + column;
        const char *weight = (const char *)job.weight2 + ((size_t)column * job.matrices + matrix * WIDTH) * units * sizeof(A);
        const int *entry = chunk.lists + chunk.starts[matrix], *end = chunk.lists + chunk.starts[matrix + 1];
        while (entry < end && *entry < from) entry++;
        int next = from;  // Tokens before this one are in the list, or have got the offsets back.
        for (int count; entry < end && *entry < to; entry += count) {
            for (count = 0; count < BLOCK && entry + count < end && entry[count] < to; count++, next++)
                for (; next < entry[count]; next++) add_offsets(sums + (size_t)(next - from) * WIDTH, offsets, 1);
            const A *rows = (const A *)chunk.factors + (entry - chunk.lists) * (size_t)units;
            if (is_range(entry, count)) {
                block_product(count, WIDTH, units, units, true, rows, weight, sums + (size_t)(*entry - from) * WIDTH);
                continue;
            }
            block_product(padded(count, 8), WIDTH, units, units, false, rows, weight, part);
            for (int i = 0; i < count; i++) add_row(sums + (size_t)(entry[i] - from) * WIDTH, part + i * WIDTH);
        }
        for (; next < to; next++) add_offsets(sums + (size_t)(next - from) * WIDTH, offsets, 1);
    }
    for (int t = from; t < to; t++) {
        T *out = (T *)job.out + (size_t)(chunk.begin + t) * job.channels + column;
        for (int c = 0; c < columns; c += LANES) {
            const vec y = number(sums + (size_t)(t - from) * WIDTH + c, job.scales2 + column + c, chunk.hidden_scales[t]);
            put_columns(out + c, y + load<vec>(job.bias2 + column + c), columns - c);
        }
    }
}

}  // namespace NAMESPACE
