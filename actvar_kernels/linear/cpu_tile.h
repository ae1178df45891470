// A linear layer for one instruction set, included by ../cpu_levels.h behind ../cpu_vectors.h.

namespace NAMESPACE {

template <class T, int V, int R = ROWS>
void tile(int count, const T *const *rows, const T *panel, int depth, Ahead next, const float *bias, T *const *out,
          int columns) {
    if constexpr (R > 1)
        if (count < R) return tile<T, V, R - 1>(count, rows, panel, depth, next, bias, out, columns);
    vec sums[R][V] = {};
    multiply<T, R, V>(rows, panel, depth, sums, next);
    for (int r = 0; r < R; r++)
        for (int j = 0; j < V; j++)
            put_columns(out[r] + j * LANES, sums[r][j] + load<vec>(bias + j * LANES), columns - j * LANES);
}

template <class T, int V = VECTORS>
void panel_rows(int vectors, int count, const T *const *rows, const T *panel, int depth, Ahead next, const float *bias,
                T *const *out, int columns) {
    if constexpr (V > 1)
        if (vectors < V) return panel_rows<T, V - 1>(vectors, count, rows, panel, depth, next, bias, out, columns);
    tile<T, V>(count, rows, panel, depth, next, bias, out, columns);
}

// The columns of panel number `panel` for the rows [begin, end); `next` is the panel that this thread is likely to take next.
template <class T> void run(const Job &job, int panel, int next, int begin, int end) {
    const int column = panel * PANEL, depth = padded(job.depth, Product<T>::STEP);
    const int vectors = smaller(padded(job.columns, LANES) - column, PANEL) / LANES;
    const T *weight = (const T *)job.weight + (size_t)column * depth;
    const int next_column = smaller(next * PANEL, job.columns), next_end = smaller(next_column + PANEL, job.columns);
    const Ahead ahead = {(const char *)((const T *)job.weight + (size_t)next_column * depth),
                         sizeof(T) * (next_end - next_column) * depth};
    for (int i = begin; i < end; i += ROWS) {
        const int count = smaller(end - i, ROWS);
        const T *rows[ROWS];
        T *out[ROWS];
        for (int r = 0; r < count; r++) {
            rows[r] = (const T *)job.x + (size_t)(i + r) * job.depth;
            out[r] = (T *)job.out + (size_t)(i + r) * job.columns + column;
        }
        panel_rows<T>(vectors, count, rows, weight, job.depth, ahead.part(i - begin, i - begin + count, end - begin),
                      job.bias + column, out, job.columns - column);
    }
}

}  // namespace NAMESPACE
