// The expert FFN for one instruction set, included by ../cpu_levels.h behind ../cpu_vectors.h.

namespace NAMESPACE {

template <class T, int R, int V>
void up(const T *const *rows, const T *panel, int depth, Ahead next, const float *bias, T *hidden, int hidden_stride) {
    vec sums[R][V] = {};
    multiply<T, R, V>(rows, panel, depth, sums, next);
    for (int r = 0; r < R; r++)
        for (int j = 0; j < V; j++)
            Product<T>::put(hidden + (size_t)r * hidden_stride + j * LANES,
                            gelu(sums[r][j] + load<vec>(bias + j * LANES)));
}

template <class T, int R, int V> void down(const T *const *rows, const T *panel, int depth, Ahead next, float *const *out) {
    vec sums[R][V] = {};
    multiply<T, R, V>(rows, panel, depth, sums, next);
    for (int r = 0; r < R; r++)
        for (int j = 0; j < V; j++) store(out[r] + j * LANES, load<vec>(out[r] + j * LANES) + sums[r][j]);
}

// Tiles of up to ROWS rows and of a panel of up to VECTORS vectors.
template <class T, int V, int R = ROWS>
void up_tile(int count, const T *const *rows, const T *panel, int depth, Ahead next, const float *bias, T *hidden,
             int stride) {
    if constexpr (R > 1)
        if (count < R) return up_tile<T, V, R - 1>(count, rows, panel, depth, next, bias, hidden, stride);
    up<T, R, V>(rows, panel, depth, next, bias, hidden, stride);
}
template <class T, int V, int R = ROWS>
void down_tile(int count, const T *const *rows, const T *panel, int depth, Ahead next, float *const *out) {
    if constexpr (R > 1)
        if (count < R) return down_tile<T, V, R - 1>(count, rows, panel, depth, next, out);
    down<T, R, V>(rows, panel, depth, next, out);
}
template <class T, int V = VECTORS>
void up_panel(int vectors, int count, const T *const *rows, const T *panel, int depth, Ahead next, const float *bias,
              T *hidden, int stride) {
    if constexpr (V > 1)
        if (vectors < V) return up_panel<T, V - 1>(vectors, count, rows, panel, depth, next, bias, hidden, stride);
    up_tile<T, V>(count, rows, panel, depth, next, bias, hidden, stride);
}
template <class T, int V = VECTORS>
void down_panel(int vectors, int count, const T *const *rows, const T *panel, int depth, Ahead next,
                float *const *out) {
    if constexpr (V > 1)
        if (vectors < V) return down_panel<T, V - 1>(vectors, count, rows, panel, depth, next, out);
    down_tile<T, V>(count, rows, panel, depth, next, out);
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

// Hidden units of an expert from `column` on, one panel, for `count` tokens: `hidden` [count, hidden_stride].
template <class T>
void up_columns(const Job &job, int expert, int column, const int *tokens, int count, Ahead next, T *hidden) {
    const int stride = padded(job.width, LANES), depth = padded(job.channels, Product<T>::STEP);
    const int vectors = smaller(stride - column, PANEL) / LANES;
    const T *weight = (const T *)job.weight1 + (size_t)expert * depth * stride + (size_t)column * depth;
    const float *bias = job.bias1 + (size_t)expert * stride + column;
    for (int i = 0; i < count; i += ROWS) {
        const int group = smaller(count - i, ROWS);
        const T *rows[ROWS];
        for (int r = 0; r < group; r++) rows[r] = (const T *)job.u + (size_t)tokens[i + r] * job.channels;
        up_panel<T>(vectors, group, rows, weight, depth, next.part(i, i + group, count), bias,
                    hidden + (size_t)i * stride + column, stride);
    }
}

// Adds an expert's output, the channels of one panel from `column` on, to the sums of `count` tokens; those of token 0
// would be at `sums`.
template <class T>
void down_columns(const Job &job, int expert, int column, const int *tokens, int count, const T *hidden, Ahead next,
                  float *sums) {
    const int stride = padded(job.channels, LANES), hidden_stride = padded(job.width, LANES);
    const int depth = padded(job.width, Product<T>::STEP), vectors = smaller(stride - column, PANEL) / LANES;
    const T *weight = (const T *)job.weight2 + (size_t)expert * depth * stride + (size_t)column * depth;
    for (int i = 0; i < count; i += ROWS) {
        const int group = smaller(count - i, ROWS);
        const T *rows[ROWS];
        float *out[ROWS];
        for (int r = 0; r < group; r++) {
            rows[r] = hidden + (size_t)(i + r) * hidden_stride;
            out[r] = sums + (size_t)tokens[i + r] * stride + column;
        }
        down_panel<T>(vectors, group, rows, weight, depth, next.part(i, i + group, count), out);
    }
}

// Channels [from, to) of a token's sums, rounded.
template <class T> void finish(const Job &job, int token, const float *sums, int from, int to) {
    T *out = (T *)job.out + (size_t)token * job.channels;
    for (int c = from; c < to; c += LANES) put_columns(out + c, load<vec>(sums + c), to - c);
}

// The tokens of [begin, end) that chose an expert; returns how many.
inline int choose(const Job &job, int expert, int begin, int end, int *tokens) {
    int count = 0;
    for (int t = begin; t < end; t++)
        if (job.mask[(size_t)t * job.experts + expert]) tokens[count++] = t;
    return count;
}

// All experts for the tokens [begin, end). Rows are read by pointer, one expert after the other adds to the sums.
template <class T> void run(const Job &job, int begin, int end, char *scratch) {
    const int count = end - begin, C = job.channels;
    const int hidden_stride = padded(job.width, LANES), stride = padded(C, LANES);
    float *sums = (float *)scratch;
    T *hidden = (T *)(sums + (size_t)count * stride);
    int *tokens = (int *)(hidden + (size_t)count * hidden_stride);
    for (int t = 0; t < count; t++) memcpy(sums + (size_t)t * stride, job.bias2, 4 * (size_t)stride);
    for (int expert = 0; expert < job.experts; expert++) {
        const int chosen = choose(job, expert, begin, end, tokens);
        for (int column = 0; column < hidden_stride; column += PANEL)
            up_columns<T>(job, expert, column, tokens, chosen,
                          column + PANEL < hidden_stride ? up_ahead<T>(job, expert, column + PANEL)
                                                         : down_ahead<T>(job, expert, 0),
                          hidden);
        for (int column = 0; column < stride; column += PANEL)
            down_columns<T>(job, expert, column, tokens, chosen, hidden,
                            column + PANEL < stride ? down_ahead<T>(job, expert, column + PANEL)
                                                    : up_ahead<T>(job, expert + 1, 0),
                            sums - (ptrdiff_t)begin * stride);
    }
    for (int t = 0; t < count; t++) finish<T>(job, begin + t, sums + (size_t)t * stride, 0, C);
}

// The same for few tokens, where reading the weights takes the time: threads share the panels of columns, so that each
// weight is read once. Every sum is added up in the same order as above.
template <class T> void run_few(const Job &job, char *scratch, int threads) {
    const int count = job.tokens, C = job.channels, experts = job.experts;
    const int hidden_stride = padded(job.width, LANES), stride = padded(C, LANES);
    const int up_panels = padded(hidden_stride, PANEL) / PANEL, down_panels = padded(stride, PANEL) / PANEL;
    float *sums = (float *)scratch;
    T *hidden = (T *)(sums + (size_t)count * stride);
    int *tokens = (int *)(hidden + (size_t)experts * count * hidden_stride), *chosen = tokens + (size_t)experts * count;
    for (int expert = 0; expert < experts; expert++)
        chosen[expert] = choose(job, expert, 0, count, tokens + (size_t)expert * count);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int item = 0; item < experts * up_panels; item++) {
            const int expert = item / up_panels, next = item + threads;
            up_columns<T>(job, expert, item % up_panels * PANEL, tokens + (size_t)expert * count, chosen[expert],
                          up_ahead<T>(job, next / up_panels, next % up_panels * PANEL),
                          hidden + (size_t)expert * count * hidden_stride);
        }
#pragma omp for schedule(dynamic, 1)
        for (int panel = 0; panel < down_panels; panel++) {
            const int column = panel * PANEL, end = smaller(column + PANEL, stride);
            for (int t = 0; t < count; t++)
                memcpy(sums + (size_t)t * stride + column, job.bias2 + column, 4 * (size_t)(end - column));
            for (int expert = 0; expert < experts; expert++)
                down_columns<T>(job, expert, column, tokens + (size_t)expert * count, chosen[expert],
                                hidden + (size_t)expert * count * hidden_stride,
                                expert + 1 < experts ? down_ahead<T>(job, expert + 1, column)
                                                     : down_ahead<T>(job, 0, column + threads * PANEL),
                                sums);
            for (int t = 0; t < count; t++)
                finish<T>(job, t, sums + (size_t)t * stride, column, smaller(end, C));
        }
    }
}

}  // namespace NAMESPACE
