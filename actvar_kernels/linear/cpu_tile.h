// A linear layer for one instruction set, included by ../cpu_levels.h behind ../cpu_vectors.h.

namespace NAMESPACE {

template <class T, int V, int R = ROWS>
void tile(int count, const T *const *rows, const T *panel, int depth, const float *bias, T *const *out, int columns) {
    if constexpr (R > 1)
        if (count < R) return tile<T, V, R - 1>(count, rows, panel, depth, bias, out, columns);
    vec sums[R][V] = {};
    multiply<T, R, V>(rows, panel, depth, sums);
    for (int r = 0; r < R; r++)
        for (int j = 0; j < V; j++)
            put_columns(out[r] + j * LANES, sums[r][j] + load<vec>(bias + j * LANES), columns - j * LANES);
}

template <class T, int V = VECTORS>
void panel_rows(int vectors, int count, const T *const *rows, const T *panel, int depth, const float *bias,
                T *const *out, int columns) {
    if constexpr (V > 1)
        if (vectors < V) return panel_rows<T, V - 1>(vectors, count, rows, panel, depth, bias, out, columns);
    tile<T, V>(count, rows, panel, depth, bias, out, columns);
}

// The columns of panel number `panel` for the rows [begin, end).
template <class T> void run(const Job &job, int panel, int begin, int end) {
    const int column = panel * PANEL, depth = padded(job.depth, Product<T>::STEP);
    const int vectors = smaller(padded(job.columns, LANES) - column, PANEL) / LANES;
    const T *weight = (const T *)job.weight + (size_t)column * depth;
    for (int i = begin; i < end; i += ROWS) {
        const int count = smaller(end - i, ROWS);
        const T *rows[ROWS];
        T *out[ROWS];
        for (int r = 0; r < count; r++) {
            rows[r] = (const T *)job.x + (size_t)(i + r) * job.depth;
            out[r] = (T *)job.out + (size_t)(i + r) * job.columns + column;
        }
        panel_rows<T>(vectors, count, rows, weight, job.depth, job.bias + column, out, job.columns - column);
    }
}

}  // namespace NAMESPACE
