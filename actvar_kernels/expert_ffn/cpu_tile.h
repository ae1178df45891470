// The expert FFN for one instruction set, included by ../cpu_backend/isa.h behind ../cpu_backend/vectors.h.

namespace NAMESPACE {

// Where the rows of tokens are: `data` + block * of_block + token * of_token.
template <class T> struct Rows {
    const T *data;
    size_t of_block, of_token;
};

// Row i of `totals` (+)= row i of `from` times a panel, for `count` rows; with `tokens` row tokens[i] of `from`, with
// `to_tokens` of `totals`. `first`: what was there is overwritten.
template <class T>
void add_columns(const Blocks &blocks, int vectors, int count, const int *tokens, const Rows<T> &from, const T *panel,
                 Ahead next, bool first, const int *to_tokens, float *totals, int stride) {
    const int tiles = padded(count, ROWS) / ROWS;
    for (int block = 0, done = 0; block < blocks.count; block++)
        for (int i = 0; i < count; i += ROWS, done++) {
            const T *rows[ROWS];
            float *to[ROWS];
            for (int r = 0; r < smaller(count - i, ROWS); r++) {
                rows[r] = from.data + block * from.of_block + (tokens ? tokens[i + r] : i + r) * from.of_token;
                to[r] = totals + (size_t)(to_tokens ? to_tokens[i + r] : i + r) * stride;
            }
            add_product<T>(vectors, smaller(count - i, ROWS), rows, panel + (size_t)block * blocks.size * vectors * LANES,
                           blocks.length(block), next.part(done, done + 1, blocks.count * tiles), first && block == 0, to);
        }
}

// The panels of an expert's two weights from `column` on, to be fetched ahead; nothing behind the last expert or column.
template <class T> Ahead up_ahead(const Job &job, int expert, int column) {
    const int stride = padded(job.width, LANES), depth = padded(job.channels, Product<T>::STEP);
    if (expert >= job.experts || column >= stride) return {(const char *)job.weight1, 0};
    const T *weight = (const T *)job.weight1 + (size_t)expert * depth * stride + (size_t)column * depth;
    return {(const char *)weight, sizeof(T) * smaller(stride - column, PANEL) * depth};
}
template <class T> Ahead down_ahead(const Job &job, int expert, int column) {
    const int stride = padded(job.channels, LANES), depth = padded(job.width, Product<T>::STEP);
    if (expert >= job.experts || column >= stride) return {(const char *)job.weight2, 0};
    const T *weight = (const T *)job.weight2 + (size_t)expert * depth * stride + (size_t)column * depth;
    return {(const char *)weight, sizeof(T) * smaller(stride - column, PANEL) * depth};
}

// A row of hidden units; rows are no multiple of a page apart, so that those of a tile do not share a place in the cache.
template <class T> int hidden_stride(const Job &job) { return padded(job.width, LANES) + LANES; }

// Hidden units of an expert from `column` on, one panel, for `count` tokens: `hidden` [count, hidden_stride]; `totals`
// has room for [count, PANEL].
template <class T>
void up_columns(const Job &job, int expert, int column, const int *tokens, int count, const Rows<T> &u, Ahead next,
                T *hidden, float *totals) {
    const int width = padded(job.width, LANES), depth = padded(job.channels, Product<T>::STEP);
    const int vectors = smaller(width - column, PANEL) / LANES;
    const T *panel = (const T *)job.weight1 + (size_t)expert * depth * width + (size_t)column * depth;
    const float *bias = job.bias1 + (size_t)expert * width + column;
    add_columns<T>(blocks_of<T>(depth), vectors, count, tokens, u, panel, next, true, nullptr, totals, PANEL);
    for (int i = 0; i < count; i++)
        for (int c = 0; c < vectors * LANES; c += LANES)
            Product<T>::put(hidden + (size_t)i * hidden_stride<T>(job) + column + c,
                            gelu(load<vec>(totals + (size_t)i * PANEL + c) + load<vec>(bias + c)));
}

// Adds an expert's output, the channels of one panel from `column` on, to the sums of `count` tokens.
template <class T>
void down_columns(const Job &job, int expert, int column, const int *tokens, int count, const T *hidden, Ahead next,
                  float *sums) {
    const int stride = padded(job.channels, LANES), depth = padded(job.width, Product<T>::STEP);
    const int vectors = smaller(stride - column, PANEL) / LANES;
    const T *panel = (const T *)job.weight2 + (size_t)expert * depth * stride + (size_t)column * depth;
    const Blocks blocks = blocks_of<T>(depth);
    const Rows<T> rows = {hidden, (size_t)blocks.size, (size_t)hidden_stride<T>(job)};
    add_columns<T>(blocks, vectors, count, nullptr, rows, panel, next, false, tokens, sums + column, stride);
}

// Channels [from, to) of a token's sums, rounded.
template <class T> void finish(const Job &job, int token, const float *sums, int from, int to) {
    T *out = (T *)job.out + (size_t)token * job.channels;
    for (int c = from; c < to; c += LANES) put_columns(out + c, load<vec>(sums + c), to - c);
}

// The tokens of [begin, end) that chose an expert, counted from `begin`; returns how many.
inline int choose(const Job &job, int expert, int begin, int end, int *tokens) {
    int count = 0;
    for (int t = begin; t < end; t++)
        if (job.mask[(size_t)t * job.experts + expert]) tokens[count++] = t - begin;
    return count;
}

// Tokens [begin, end) of u, packed.
template <class T> Rows<T> packed(const Job &job, int begin, int end, T *to) {
    pack_rows((const T *)job.u, begin, end, job.channels, to);
    const size_t size = blocks_of<T>(job.channels).size;
    return {to, size * (end - begin), size};
}

template <class T> T *taken(char *&scratch, size_t count) {
    T *part = (T *)scratch;
    scratch += (count * sizeof(T) + 63) / 64 * 64;
    return part;
}

template <class T> size_t scratch_bytes(const Job &job, int count, int experts) {
    const Blocks blocks = blocks_of<T>(job.channels);
    const size_t floats = padded(job.channels, LANES) + PANEL, ints = experts;
    return count * (4 * (floats + ints) + sizeof(T) * ((size_t)blocks.count * blocks.size +
                                                       (size_t)experts * hidden_stride<T>(job))) + 6 * 64;
}

// All experts for the tokens [begin, end). One expert after the other adds to the sums.
template <class T> void run(const Job &job, int begin, int end, char *scratch) {
    const int count = end - begin, C = job.channels;
    const int width = padded(job.width, LANES), stride = padded(C, LANES);
    float *sums = taken<float>(scratch, (size_t)count * stride), *totals = taken<float>(scratch, (size_t)count * PANEL);
    T *hidden = taken<T>(scratch, (size_t)count * hidden_stride<T>(job));
    int *tokens = taken<int>(scratch, count);
    const Rows<T> u = packed<T>(job, begin, end, (T *)scratch);
    for (int t = 0; t < count; t++) memcpy(sums + (size_t)t * stride, job.bias2, 4 * (size_t)stride);
    for (int expert = 0; expert < job.experts; expert++) {
        const int chosen = choose(job, expert, begin, end, tokens);
        for (int column = 0; column < width; column += PANEL)
            up_columns<T>(job, expert, column, tokens, chosen, u,
                          column + PANEL < width ? up_ahead<T>(job, expert, column + PANEL) : down_ahead<T>(job, expert, 0),
                          hidden, totals);
        for (int column = 0; column < stride; column += PANEL)
            down_columns<T>(job, expert, column, tokens, chosen, hidden,
                            column + PANEL < stride ? down_ahead<T>(job, expert, column + PANEL)
                                                    : up_ahead<T>(job, expert + 1, 0),
                            sums);
    }
    for (int t = 0; t < count; t++) finish<T>(job, begin + t, sums + (size_t)t * stride, 0, C);
}

// The same for few tokens, where reading the weights takes the time: threads share the panels of columns, so that each
// weight is read once. Every sum is added up in the same order as above.
template <class T> void run_few(const Job &job, char *scratch, int threads) {
    const int count = job.tokens, C = job.channels, experts = job.experts;
    const int width = padded(job.width, LANES), stride = padded(C, LANES);
    const int up_panels = padded(width, PANEL) / PANEL, down_panels = padded(stride, PANEL) / PANEL;
    const size_t of_expert = (size_t)count * hidden_stride<T>(job);
    float *sums = taken<float>(scratch, (size_t)count * stride);
    T *hidden = taken<T>(scratch, experts * of_expert);
    int *tokens = taken<int>(scratch, (size_t)experts * count), *chosen = taken<int>(scratch, experts);
    const Rows<T> u = packed<T>(job, 0, count, (T *)scratch);
    for (int expert = 0; expert < experts; expert++)
        chosen[expert] = choose(job, expert, 0, count, tokens + (size_t)expert * count);
#pragma omp parallel num_threads(threads)
    {
        alignas(64) float totals[FEW * PANEL];
#pragma omp for schedule(dynamic, 1)
        for (int item = 0; item < experts * up_panels; item++) {
            const int expert = item / up_panels, next = item + threads;
            up_columns<T>(job, expert, item % up_panels * PANEL, tokens + (size_t)expert * count, chosen[expert], u,
                          up_ahead<T>(job, next / up_panels, next % up_panels * PANEL), hidden + expert * of_expert,
                          totals);
        }
#pragma omp for schedule(dynamic, 1)
        for (int panel = 0; panel < down_panels; panel++) {
            const int column = panel * PANEL, end = smaller(column + PANEL, stride);
            for (int t = 0; t < count; t++)
                memcpy(sums + (size_t)t * stride + column, job.bias2 + column, 4 * (size_t)(end - column));
            for (int expert = 0; expert < experts; expert++)
                down_columns<T>(job, expert, column, tokens + (size_t)expert * count, chosen[expert],
                                hidden + expert * of_expert,
                                expert + 1 < experts ? down_ahead<T>(job, expert + 1, column)
                                                     : down_ahead<T>(job, 0, column + threads * PANEL),
                                sums);
            for (int t = 0; t < count; t++)
                finish<T>(job, t, sums + (size_t)t * stride, column, smaller(end, C));
        }
    }
}

}  // namespace NAMESPACE
