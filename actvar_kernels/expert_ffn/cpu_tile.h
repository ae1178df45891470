// Define the expert FFN for one instruction set. ../cpu_backend/isa.h includes this file after vectors.h.

namespace NAMESPACE {

// Locate rows of tokens: `data` + block * block_stride + token * token_stride.
template <class T> struct Rows {
    const Factor<T> *data;
    size_t block_stride, token_stride;
};

// Add row i of `from` times a panel to row i of `totals`, for `count` rows, or overwrite where `first` is set. `tokens`
// or `to_tokens`, where given, number the rows of `from` or `totals`.
template <class T>
void add_columns(const Blocks &blocks, int vectors, int count, const int *tokens, const Rows<T> &from, const T *panel,
                 Prefetch next, bool first, const int *to_tokens, float *totals, int stride) {
    const int tiles = padded(count, ROWS) / ROWS;
    for (int block = 0, done = 0; block < blocks.count; block++)
        for (int i = 0; i < count; i += ROWS, done++) {
            const Factor<T> *rows[ROWS];
            float *to[ROWS];
            for (int r = 0; r < smaller(count - i, ROWS); r++) {
                rows[r] = from.data + block * from.block_stride + (tokens ? tokens[i + r] : i + r) * from.token_stride;
                to[r] = totals + (size_t)(to_tokens ? to_tokens[i + r] : i + r) * stride;
            }
            add_product<T>(vectors, smaller(count - i, ROWS), rows, panel + (size_t)block * blocks.size * vectors * LANES,
                           blocks.length(block), next.part(done, done + 1, blocks.count * tiles), first && block == 0, to);
        }
}

// Return the panel of an expert's first or second weight from `column` on, empty after the last expert or column.
template <class T> Prefetch up_prefetch(const Job &job, int expert, int column) {
    const int stride = padded(job.width, LANES), depth = padded(job.channels, Product<T>::STEP);
    if (expert >= job.experts || column >= stride) return {(const char *)job.weight1, 0};
    const T *weight = (const T *)job.weight1 + (size_t)expert * depth * stride + (size_t)column * depth;
    return {(const char *)weight, sizeof(T) * smaller(stride - column, PANEL) * depth};
}
template <class T> Prefetch down_prefetch(const Job &job, int expert, int column) {
    const int stride = padded(job.channels, LANES), depth = padded(job.width, Product<T>::STEP);
    if (expert >= job.experts || column >= stride) return {(const char *)job.weight2, 0};
    const T *weight = (const T *)job.weight2 + (size_t)expert * depth * stride + (size_t)column * depth;
    return {(const char *)weight, sizeof(T) * smaller(stride - column, PANEL) * depth};
}

// Return the stride of hidden rows. The extra LANES keep rows of a tile apart in the cache where the width fills pages.
template <class T> int hidden_stride(const Job &job) { return padded(job.width, LANES) + LANES; }

// Compute one panel of an expert's hidden units from `column` on, for `count` tokens, in `hidden` [count,
// hidden_stride]. `totals` [count, PANEL] is scratch.
template <class T>
void up_columns(const Job &job, int expert, int column, const int *tokens, int count, const Rows<T> &u, Prefetch next,
                Factor<T> *hidden, float *totals) {
    const int width = padded(job.width, LANES), depth = padded(job.channels, Product<T>::STEP);
    const int vectors = smaller(width - column, PANEL) / LANES;
    const T *panel = (const T *)job.weight1 + (size_t)expert * depth * width + (size_t)column * depth;
    const float *bias = job.bias1 + (size_t)expert * width + column;
    add_columns<T>(blocks_of<T>(depth), vectors, count, tokens, u, panel, next, true, nullptr, totals, PANEL);
    for (int i = 0; i < count; i++)
        for (int c = 0; c < vectors * LANES; c += LANES)
            put(hidden + (size_t)i * hidden_stride<T>(job) + column + c,
                Product<T>::factor(gelu(load<vec>(totals + (size_t)i * PANEL + c) + load<vec>(bias + c))));
}

// Add one panel of an expert's output from `column` on to the sums of `count` tokens.
template <class T>
void down_columns(const Job &job, int expert, int column, const int *tokens, int count, const Factor<T> *hidden,
                  Prefetch next, float *sums) {
    const int stride = padded(job.channels, LANES), depth = padded(job.width, Product<T>::STEP);
    const int vectors = smaller(stride - column, PANEL) / LANES;
    const T *panel = (const T *)job.weight2 + (size_t)expert * depth * stride + (size_t)column * depth;
    const Blocks blocks = blocks_of<T>(depth);
    const Rows<T> rows = {hidden, (size_t)blocks.size, (size_t)hidden_stride<T>(job)};
    add_columns<T>(blocks, vectors, count, nullptr, rows, panel, next, false, tokens, sums + column, stride);
}

// Store channels [from, to) of a token's sums in `out`, rounded.
template <class T> void finish(const Job &job, int token, const float *sums, int from, int to) {
    T *out = (T *)job.out + (size_t)token * job.channels;
    for (int c = from; c < to; c += LANES) put_columns(out + c, load<vec>(sums + c), to - c);
}

// List the tokens of [begin, end) that chose an expert, counted from `begin`, and return how many there are.
inline int choose(const Job &job, int expert, int begin, int end, int *tokens) {
    int count = 0;
    for (int t = begin; t < end; t++)
        if (job.mask[(size_t)t * job.experts + expert]) tokens[count++] = t - begin;
    return count;
}

// Pack tokens [begin, end) of u.
template <class T> Rows<T> pack_tokens(const Job &job, int begin, int end, Factor<T> *to) {
    pack_rows((const T *)job.u, begin, end, job.channels, to);
    const size_t size = blocks_of<T>(job.channels).size;
    return {to, size * (end - begin), size};
}

template <class T> size_t scratch_bytes(const Job &job, int count, int experts) {
    const Blocks blocks = blocks_of<T>(job.channels);
    const size_t floats = padded(job.channels, LANES) + PANEL, ints = experts;
    return count * (4 * (floats + ints) + sizeof(Factor<T>) * ((size_t)blocks.count * blocks.size +
                                                       (size_t)experts * hidden_stride<T>(job))) + 6 * 64;
}

// Compute all experts for the tokens [begin, end). One expert after the other adds to the sums.
template <class T> void run(const Job &job, int begin, int end, char *scratch) {
    const int count = end - begin, C = job.channels;
    const int width = padded(job.width, LANES), stride = padded(C, LANES);
    float *sums = take<float>(scratch, (size_t)count * stride), *totals = take<float>(scratch, (size_t)count * PANEL);
    Factor<T> *hidden = take<Factor<T>>(scratch, (size_t)count * hidden_stride<T>(job));
    int *tokens = take<int>(scratch, count);
    const Rows<T> u = pack_tokens<T>(job, begin, end, (Factor<T> *)scratch);
    for (int t = 0; t < count; t++) memcpy(sums + (size_t)t * stride, job.bias2, 4 * (size_t)stride);
    for (int expert = 0; expert < job.experts; expert++) {
        const int chosen = choose(job, expert, begin, end, tokens);
        for (int column = 0; column < width; column += PANEL)
            up_columns<T>(job, expert, column, tokens, chosen, u,
                          column + PANEL < width ? up_prefetch<T>(job, expert, column + PANEL)
                                                 : down_prefetch<T>(job, expert, 0),
                          hidden, totals);
        for (int column = 0; column < stride; column += PANEL)
            down_columns<T>(job, expert, column, tokens, chosen, hidden,
                            column + PANEL < stride ? down_prefetch<T>(job, expert, column + PANEL)
                                                    : up_prefetch<T>(job, expert + 1, 0),
                            sums);
    }
    for (int t = 0; t < count; t++) finish<T>(job, begin + t, sums + (size_t)t * stride, 0, C);
}

// Compute all experts for few tokens, where reading the weights takes the time. Threads share the panels of columns, so
// that each weight is read once. Every sum is added up in the same order as in `run`.
template <class T> void run_few(const Job &job, char *scratch, int threads) {
    const int count = job.tokens, C = job.channels, experts = job.experts;
    const int width = padded(job.width, LANES), stride = padded(C, LANES);
    const int up_panels = padded(width, PANEL) / PANEL, down_panels = padded(stride, PANEL) / PANEL;
    const size_t expert_size = (size_t)count * hidden_stride<T>(job);
    float *sums = take<float>(scratch, (size_t)count * stride);
    Factor<T> *hidden = take<Factor<T>>(scratch, experts * expert_size);
    int *tokens = take<int>(scratch, (size_t)experts * count), *chosen = take<int>(scratch, experts);
    const Rows<T> u = pack_tokens<T>(job, 0, count, (Factor<T> *)scratch);
    for (int expert = 0; expert < experts; expert++)
        chosen[expert] = choose(job, expert, 0, count, tokens + (size_t)expert * count);
#pragma omp parallel num_threads(threads)
    {
        alignas(64) float totals[FEW_TOKENS * PANEL];
#pragma omp for schedule(dynamic, 1)
        for (int item = 0; item < experts * up_panels; item++) {
            const int expert = item / up_panels, next = item + threads;
            up_columns<T>(job, expert, item % up_panels * PANEL, tokens + (size_t)expert * count, chosen[expert], u,
                          up_prefetch<T>(job, next / up_panels, next % up_panels * PANEL),
                          hidden + expert * expert_size, totals);
        }
#pragma omp for schedule(dynamic, 1)
        for (int panel = 0; panel < down_panels; panel++) {
            const int column = panel * PANEL, end = smaller(column + PANEL, stride);
            for (int t = 0; t < count; t++)
                memcpy(sums + (size_t)t * stride + column, job.bias2 + column, 4 * (size_t)(end - column));
            for (int expert = 0; expert < experts; expert++)
                down_columns<T>(job, expert, column, tokens + (size_t)expert * count, chosen[expert],
                                hidden + expert * expert_size,
                                expert + 1 < experts ? down_prefetch<T>(job, expert + 1, column)
                                                     : down_prefetch<T>(job, 0, column + threads * PANEL),
                                sums);
            for (int t = 0; t < count; t++)
                finish<T>(job, t, sums + (size_t)t * stride, column, smaller(end, C));
        }
    }
}

}  // namespace NAMESPACE
