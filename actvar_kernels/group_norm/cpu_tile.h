// Define GroupNorm and SiLU for one instruction set. ../cpu_backend/isa.h includes this file after vectors.h.

namespace NAMESPACE {

// Add the numbers and the squares of V vectors of channels from the c-th on to those of their groups. float32 sums run
// about the mean of each channel, so that a mean much larger than the deviation costs no digits.
template <int V, class T> void add_moments(const Job &job, const Chunk &chunk, int c, Moments *groups) {
    const int C = job.channels, width = C / job.groups;
    const T *from = (const T *)job.x + (chunk.image * job.pixels + chunk.first) * C + c;
    vec sum[V] = {}, deviations[V] = {}, squares[V] = {};
    for (int i = 0; i < chunk.count; i++)
        for (int v = 0; v < V; v++) sum[v] += wide(from + (size_t)i * C + v * LANES);
    for (int v = 0; v < V; v++) sum[v] *= 1.0f / chunk.count;  // the mean; `deviations` make up for its rounding
    for (int i = 0; i < chunk.count; i++)
        for (int v = 0; v < V; v++) {
            const vec deviation = wide(from + (size_t)i * C + v * LANES) - sum[v];
            deviations[v] += deviation;
            squares[v] += deviation * deviation;
        }
    for (int j = 0; j < V * LANES; j++) {
        Moments &group = groups[(c + j) / width];
        const int v = j / LANES, lane = j % LANES;
        const double center = sum[v][lane], total = chunk.count * center;
        group.sum += total + deviations[v][lane];
        group.squares += squares[v][lane] + center * (total + 2 * deviations[v][lane]);
    }
}

// Sum each group's numbers and their squares, of neighbouring channels at once.
template <class T> void moments(const Job &job, const Chunk &chunk, Moments *groups) {
    int c = 0;
    for (int g = 0; g < job.groups; g++) groups[g] = {0, 0};
    for (; c + 4 * LANES <= job.channels; c += 4 * LANES) add_moments<4, T>(job, chunk, c, groups);
    for (; c < job.channels; c += LANES) add_moments<1, T>(job, chunk, c, groups);
}

// Compute (x - mean) * factor + bias by channel for a chunk, then SiLU.
template <class T>
void normalize(const Job &job, const Chunk &chunk, const float *means, const float *factors, const float *bias) {
    const int C = job.channels;
    const size_t begin = (chunk.image * job.pixels + chunk.first) * C;
    const T *from = (const T *)job.x + begin;
    T *to = (T *)job.out + begin;
    for (int i = 0; i < chunk.count; i++, from += C, to += C)
        for (int c = 0; c < C; c += LANES) {
            vec y = (wide(from + c) - load<vec>(means + c)) * load<vec>(factors + c) + load<vec>(bias + c);
            if (job.silu) y = y / (1.0f + exponential(-y));
            put(to + c, y);
        }
}

}  // namespace NAMESPACE
