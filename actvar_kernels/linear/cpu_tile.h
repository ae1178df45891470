// Define a linear layer for one instruction set. ../cpu_backend/isa.h includes this file after vectors.h.

namespace NAMESPACE {

template <class T> size_t scratch_bytes(const Job &job, int rows) {
    const Blocks blocks = blocks_of<T>(job.depth);
    return (size_t)rows * (blocks.count * blocks.size * sizeof(Factor<T>) + PANEL * sizeof(float)) + 64;
}

template <class T> void pack(const Job &job, int begin, int end, char *scratch) {
    char *to = scratch + padded((end - begin) * PANEL * sizeof(float), 64);
    pack_rows((const T *)job.x, begin, end, job.depth, (Factor<T> *)to);
}

// Compute the columns of panel number `panel` for the rows [begin, end), which lie packed in `scratch`. `next` is the
// panel that this thread is likely to take next.
template <class T> void run(const Job &job, int panel, int next, int begin, int end, char *scratch) {
    const int count = end - begin, column = panel * PANEL, columns = smaller(job.columns - column, PANEL);
    const int vectors = padded(columns, LANES) / LANES;
    const Blocks blocks = blocks_of<T>(job.depth);
    float *totals = (float *)scratch;  // [count, PANEL]
    const Factor<T> *packed = (const Factor<T> *)(scratch + padded(count * PANEL * sizeof(float), 64));
    const T *weight = (const T *)job.weight + (size_t)column * job.depth;
    const int next_column = smaller(next * PANEL, job.columns), next_end = smaller(next_column + PANEL, job.columns);
    const Prefetch prefetch = {(const char *)((const T *)job.weight + (size_t)next_column * job.depth),
                         sizeof(T) * (next_end - next_column) * job.depth};
    for (int block = 0, done = 0; block < blocks.count; block++) {
        const Factor<T> *block_rows = packed + (size_t)block * count * blocks.size;
        for (int i = 0; i < count; i += ROWS, done++) {
            const Factor<T> *rows[ROWS];
            float *to[ROWS];
            for (int r = 0; r < smaller(count - i, ROWS); r++) {
                rows[r] = block_rows + (size_t)(i + r) * blocks.size;
                to[r] = totals + (size_t)(i + r) * PANEL;
            }
            add_product<T>(vectors, smaller(count - i, ROWS), rows,
                           weight + (size_t)block * blocks.size * vectors * LANES, blocks.length(block),
                           prefetch.part(done, done + 1, blocks.count * padded(count, ROWS) / ROWS), block == 0, to);
        }
    }
    for (int i = 0; i < count; i++)
        for (int c = 0; c < columns; c += LANES)
            put_columns((T *)job.out + (size_t)(begin + i) * job.columns + column + c,
                        load<vec>(totals + (size_t)i * PANEL + c) + load<vec>(job.bias + column + c), columns - c);
}

// Add x times w to a sum, number by number, for STEP neighbouring numbers.
template <class T> struct Dot {
    static constexpr int STEP = LANES;
    static inline vec add(vec sum, const T *x, const T *w) { return sum + wide(x) * wide(w); }
};
#if DOT
template <> struct Dot<bfloat16> {
    static constexpr int STEP = 2 * LANES;
    static inline vec add(vec sum, const bfloat16 *x, const bfloat16 *w) {
        return (vec)_mm512_dpbf16_ps((__m512)sum, load<__m512bh>(x), load<__m512bh>(w));
    }
};
#endif

// Compute `column` and the next for at most R rows and a weight [columns, depth]; depth is a multiple of 2 LANES.
template <class T, int R = FEW_ROWS> void run_unpacked(const Job &job, int column) {
    if constexpr (R > 1)
        if (job.rows < R) return run_unpacked<T, R - 1>(job, column);
    constexpr int DISTANCE = 16 << 10;  // The processor itself prefetches only within a page.
    const int depth = job.depth, other = column + 1 < job.columns ? column + 1 : column;
    const T *x = (const T *)job.x, *weights[2];
    for (int j = 0; j < 2; j++) weights[j] = (const T *)job.weight + (size_t)(j ? other : column) * depth;
    vec sums[2][R] = {};
    for (int k = 0; k < depth; k += Dot<T>::STEP)
        for (int j = 0; j < 2; j++) {
            __builtin_prefetch((const char *)(weights[j] + k) + DISTANCE);
            for (int r = 0; r < R; r++) sums[j][r] = Dot<T>::add(sums[j][r], x + (size_t)r * depth + k, weights[j] + k);
        }
    for (int j = 0; j < 2; j++)
        for (int r = 0; r < R; r++) {
            float total = 0;
            for (int i = 0; i < LANES; i++) total += sums[j][r][i];
            const int to = j ? other : column;
            put_columns((T *)job.out + (size_t)r * job.columns + to, vec{} + (total + job.bias[to]), 1);
        }
}

}  // namespace NAMESPACE
