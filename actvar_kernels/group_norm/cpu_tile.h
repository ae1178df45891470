// Define GroupNorm and SiLU for one instruction set. ../cpu_backend/isa.h includes this file after vectors.h.

namespace NAMESPACE {

// Sum each group's numbers and their squares. float32 sums run about the mean of each channel, so that a mean much
// larger than the deviation costs no digits.
template <class T> void moments(const Job &job, const Chunk &chunk, Moments *groups) {
    const int C = job.channels, width = C / job.groups;
    const T *from = (const T *)job.x + (chunk.image * job.pixels + chunk.first) * C;
    for (int g = 0; g < job.groups; g++) groups[g] = {0, 0};
    for (int c = 0; c < C; c += LANES) {
        vec sum = {}, deviations = {}, squares = {};
        for (int i = 0; i < chunk.count; i++) sum += wide(from + (size_t)i * C + c);
        const vec mean = sum * (1.0f / chunk.count);  // `deviations` make up for rounding the mean.
        for (int i = 0; i < chunk.count; i++) {
            const vec deviation = wide(from + (size_t)i * C + c) - mean;
            deviations += deviation;
            squares += deviation * deviation;
        }
        for (int j = 0; j < LANES; j++) {
            Moments &group = groups[(c + j) / width];
            const double center = mean[j], total = chunk.count * center;
            group.sum += total + deviations[j];
            group.squares += squares[j] + center * (total + 2 * deviations[j]);
        }
    }
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
