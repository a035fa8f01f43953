// The loops of mixtures on a CPU in float32, a library for each number of components (-DCOMPONENTS=3).
//
// library.py compiles this file and says what the functions at its end take. The mathematics is that of eager.py,
// whose names are used here too: m and v are a batch's moments, r = (v + eps)^(-1/2), tau posteriors.
//
// The loops run over planes: the values of one channel, contiguous. Activations in any layout are gathered into planes,
// padded to whole vectors, chunk by chunk, in cache, and scattered back. Where many channels are adjacent and share
// posteriors, most loops read squares of them, or rows. A single channel has posteriors of its own and is finished
// before the next one begins, so that memory is read once in either pass. Groups of channels share theirs and need two
// passes. Chunks are summed in float64. Neither the layout nor the number of threads changes a number.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>

#ifndef COMPONENTS
#define COMPONENTS 3
#endif

namespace {

constexpr int K = COMPONENTS;
#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
using std::int64_t;
template <int N> struct Vector { typedef float Type __attribute__((vector_size(4 * N))); };
typedef Vector<W>::Type V;
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef float Loose __attribute__((vector_size(4 * W), aligned(4), may_alias));

constexpr int64_t CHUNK = 2048;        // values of a channel; with their posteriors they nearly fill an L1 cache
constexpr int64_t RESIDENT = 3 << 19;  // working set (1.5 x L2) up to which posteriors are recomputed instead of stored
constexpr int64_t JOINT = 384 << 10;   // bytes of a chunk of channels that share posteriors
constexpr int64_t SMALL = 1 << 15;     // values below which waking another thread takes longer than the work
constexpr float TINY = std::numeric_limits<float>::min();
constexpr double LOG2_E = 1.4426950408889634;

inline V load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<Loose*>(p) = v; }
inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

template <int N, int... Is>
inline typename Vector<N / 2>::Type halves(typename Vector<N>::Type v, std::integer_sequence<int, Is...>) {
    return __builtin_shufflevector(v, v, Is...) + __builtin_shufflevector(v, v, (Is + N / 2)...);
}
template <int N> inline float horizontal_sum(typename Vector<N>::Type v) {
    if constexpr (N == 2)
        return v[0] + v[1];
    else
        return horizontal_sum<N / 2>(halves<N>(v, std::make_integer_sequence<int, N / 2>()));
}
inline float horizontal_sum(V v) { return horizontal_sum<W>(v); }

// Scratch memory of a thread, kept from call to call: fresh pages cost more than the loops.
struct Buffer {
    float* data = nullptr;
    int64_t size = 0;
    float* reserve(int64_t n) {
        if (n > size) {
            std::free(data);
            data = static_cast<float*>(std::aligned_alloc(64, (4 * n + 63) / 64 * 64));
            size = data ? n : 0;
            if (!data) std::abort();
        }
        return data;
    }
    ~Buffer() { std::free(data); }
};
thread_local Buffer own_buffer, shared_buffer;

// ---- Between activations and planes ----

// An activation of n samples, c channels and l positions; rows: the channels of a location lie side by side.
struct Shape {
    int64_t n, c, l;
    bool rows;
    int64_t locations() const { return n * l; }
    float first(const float* t, int64_t channel) const { return t[channel * (rows ? 1 : l)]; }
};

template <int... Is> inline V low(V a, V b, std::integer_sequence<int, Is...>) {
    return __builtin_shufflevector(a, b, (Is / 2 + (Is % 2 ? W : 0))...);
}
template <int... Is> inline V high(V a, V b, std::integer_sequence<int, Is...>) {
    return __builtin_shufflevector(a, b, (Is / 2 + W / 2 + (Is % 2 ? W : 0))...);
}

// Transpose W x W numbers: perfect shuffles of rows and columns together.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    constexpr std::make_integer_sequence<int, W> each;
    V a[W], b[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) a[i] = load(from + i * from_stride);
#pragma GCC unroll 4
    for (int step = 1; step < W; step *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; ++i) {
            b[2 * i] = low(a[i], a[i + W / 2], each);
            b[2 * i + 1] = high(a[i], a[i + W / 2], each);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) a[i] = b[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) store(to + i * to_stride, a[i]);
}

// Rows are prefetched so many locations before they are read or written.
constexpr int64_t AHEAD = 64;
inline void prefetch_rows(const float* from, int64_t c, int64_t rows) {
    for (int64_t i = AHEAD; i < AHEAD + rows; ++i) __builtin_prefetch(from + i * c, 0, 2);
}
inline void prefetch_written(float* to, int64_t c, int64_t rows) {
    for (int64_t i = AHEAD; i < AHEAD + rows; ++i) __builtin_prefetch(to + i * c, 1, 2);
}

// Transpose a rectangle: to[j][i] = from[i][j] for i < n and j < m. Rows of an activation are visited in order and
// prefetched: those that are read or, if WRITTEN, those that are written to.
template <bool WRITTEN>
inline void transpose_all(const float* from, int64_t from_stride, int64_t n, int64_t m, float* to, int64_t to_stride) {
    const auto square = [&](int64_t i, int64_t j) {
        if constexpr (WRITTEN)
            prefetch_written(to + j * to_stride + i, to_stride, W);
        else
            prefetch_rows(from + i * from_stride + j, from_stride, W);
        transpose(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    };
    const int64_t whole_n = n / W * W, whole_m = m / W * W;
    if constexpr (WRITTEN)
        for (int64_t j = 0; j < whole_m; j += W)
            for (int64_t i = 0; i < whole_n; i += W) square(i, j);
    else
        for (int64_t i = 0; i < whole_n; i += W)
            for (int64_t j = 0; j < whole_m; j += W) square(i, j);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = i < whole_n ? whole_m : 0; j < m; ++j) to[j * to_stride + i] = from[i * from_stride + j];
}

template <class Move> inline void segments(const Shape& s, int64_t channel, int64_t start, int64_t n, Move move) {
    for (int64_t done = 0; done < n;) {
        const int64_t sample = (start + done) / s.l, position = (start + done) % s.l;
        const int64_t some = std::min(n - done, s.l - position);
        move((sample * s.c + channel) * s.l + position, done, some);
        done += some;
    }
}

inline void copy(float* to, const float* from, int64_t n) {
    if (n % W == 0)
        for (int64_t i = 0; i < n; i += W) store(to + i, load(from + i));
    else
        std::memcpy(to, from, 4 * n);
}

// Gather n locations of channels into planes, with zeros up to whole vectors.
void gather(const float* t, const Shape& s, int64_t channel, int64_t channels, int64_t start, int64_t n, float* to,
            int64_t stride) {
    if (s.rows)
        transpose_all<false>(t + start * s.c + channel, s.c, n, channels, to, stride);
    else
        for (int64_t j = 0; j < channels; ++j)
            segments(s, channel + j, start, n,
                     [&](int64_t at, int64_t done, int64_t some) { copy(to + j * stride + done, t + at, some); });
    if (n % W)
        for (int64_t j = 0; j < channels; ++j) std::fill(to + j * stride + n, to + j * stride + padded(n), 0.0f);
}

// Scatter planes into an activation.
void scatter(const float* from, int64_t stride, float* t, const Shape& s, int64_t channel, int64_t channels,
             int64_t start, int64_t n) {
    if (s.rows)
        transpose_all<true>(from, stride, channels, n, t + start * s.c + channel, s.c);
    else
        for (int64_t j = 0; j < channels; ++j)
            segments(s, channel + j, start, n,
                     [&](int64_t at, int64_t done, int64_t some) { copy(t + at, from + j * stride + done, some); });
}

// ---- Posteriors ----

// 2^t for t <= 0, and zero where that is below the least posterior (see passes.py): a polynomial about the nearest
// whole number, relative error 2e-9 before rounding; NaN stays NaN.
inline V power_of_two(V t) {
    constexpr float shift = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded
    const V whole = t + shift, rest = t - (whole - shift);
    V p = 0.00015353362005779344f * rest + 0.001339887445862177f;
    p = p * rest + 0.009618437357659623f;
    p = p * rest + 0.05550332471027214f;
    p = p * rest + 0.24022647913626965f;
    p = p * rest + 0.6931472028551028f;
    p = p * rest + 1.0f;
    const V power = (V)((U)p + ((U)whole << 23));  // overflows where it is not taken
    return t < -100.0f ? V{} : power;
}

inline V larger(V a, V b) { return a > b ? a : b; }

// Eq. 6: log densities to the base of two become posteriors, in place.
inline void normalise(V* log) {
    if constexpr (K == 1) {
        log[0] = log[0] - log[0] + 1.0f;  // NaN where the density is NaN
        return;
    }
    V most = log[0];
    for (int k = 1; k < K; ++k) most = larger(most, log[k]);
    V sum = {};
    for (int k = 0; k < K; ++k) sum += log[k] = power_of_two(log[k] - most);
    const V share = 1.0f / sum;
    for (int k = 0; k < K; ++k) log[k] *= share;
}

inline V positions_below(int64_t n) {  // all bits where a position of a vector is below n
    I at;
    for (int i = 0; i < W; ++i) at[i] = i;
    return (V)(at < (I{} + static_cast<int32_t>(n)));
}

// The mixture at one channel: log density a (x - mu)^2, to the base of two, and a constant for a group of channels.
struct Density {
    float mu[K], a[K];
};

// Posteriors (K planes, stride apart) of D channels at n locations; zero in the padding. Returns the masses.
void posteriors(const float* x, int64_t x_stride, int64_t channels, const Density* q, const float* constant, int64_t n,
                float* tau, int64_t stride, float* mass) {
    V sums[K] = {};
    const auto finish = [&](int64_t i, V* log) {
        for (int k = 0; k < K; ++k) log[k] += constant[k];
        normalise(log);
        if (i + W > n) {
            const I mask = (I)positions_below(n - i);
            for (int k = 0; k < K; ++k) log[k] = (V)((I)log[k] & mask);
        }
        for (int k = 0; k < K; ++k) {
            sums[k] += log[k];
            store(tau + k * stride + i, log[k]);
        }
    };
    constexpr int R = K <= 3 ? 4 : K <= 6 ? 2 : 1;  // vectors at once, for which a channel's numbers are read once
    int64_t i = 0;
    if (channels > 1)
        for (; i + R * W <= padded(n); i += R * W) {
            V log[R][K] = {};
            for (int64_t c = 0; c < channels; ++c) {
                V value[R];
                for (int r = 0; r < R; ++r) value[r] = load(x + c * x_stride + i + r * W);
                for (int k = 0; k < K; ++k)
                    for (int r = 0; r < R; ++r) {
                        const V u = value[r] - q[c].mu[k];
                        log[r][k] += u * u * q[c].a[k];
                    }
            }
            for (int r = 0; r < R; ++r) finish(i + r * W, log[r]);
        }
    for (; i < n; i += W) {
        V log[K] = {};
        for (int64_t c = 0; c < channels; ++c) {
            const V value = load(x + c * x_stride + i);
            for (int k = 0; k < K; ++k) {
                const V u = value - q[c].mu[k];
                log[k] += u * u * q[c].a[k];
            }
        }
        finish(i, log);
    }
    for (int k = 0; k < K; ++k) mass[k] = horizontal_sum(sums[k]);
}

// ---- Sums over a plane, and outputs ----

// A chunk's moments: the mean, less an origin near it, about a value of the chunk; squares about that mean, and what
// rounding left of it.
void plane_moments(const float* x, const float* tau, int64_t stride, int64_t n, float origin, const float* mass,
                   float* mean, float* m2) {
    const float pilot = x[0];
    V first[K] = {}, second[K] = {};
    for (int64_t i = 0; i < n; i += W) {
        const V u = load(x + i) - pilot;
        for (int k = 0; k < K; ++k) first[k] += load(tau + k * stride + i) * u;
    }
    float about[K];
    for (int k = 0; k < K; ++k) {
        about[k] = pilot + horizontal_sum(first[k]) / std::max(mass[k], TINY);
        first[k] = V{};
    }
    for (int64_t i = 0; i < n; i += W) {
        const V value = load(x + i);
        for (int k = 0; k < K; ++k) {
            const V u = value - about[k], weighted = load(tau + k * stride + i) * u;
            first[k] += weighted;
            second[k] += weighted * u;
        }
    }
    for (int k = 0; k < K; ++k) {
        const float rest = horizontal_sum(first[k]) / std::max(mass[k], TINY);
        mean[k] = (about[k] - origin) + rest;
        m2[k] = horizontal_sum(second[k]) - mass[k] * rest * rest;
    }
}

// Moments of chunks together (Chan, Golub and LeVeque 1979).
struct Joined {
    double mass = 0, mean = 0, m2 = 0;
    void add(double w, double its_mean, double its_m2) {
        if (w == 0) return;
        const double all = mass + w, difference = its_mean - mean;
        mean += difference * (w / all);
        m2 += its_m2 + difference * difference * (mass * w / all);
        mass = all;
    }
    float mean_from(float origin) const { return mass == 0 ? 0.0f : static_cast<float>(origin + mean); }
    float variance() const {
        const double v = m2 / std::max(mass, static_cast<double>(TINY));
        return static_cast<float>(v < 0 ? 0.0 : v);  // NaN stays NaN
    }
};

// y = sum_k tau_k r_k (x - m_k) + bias, where r has all factors; numbers of a channel, or vectors of one each.
template <class P, class T> inline V output(V value, const T* tau, const P* m, const P* r, P bias) {
    V sum = V{} + bias;
    for (int k = 0; k < K; ++k) sum += (value - m[k]) * (tau[k] * r[k]);
    return sum;
}
inline void plane_output(const float* x, const float* tau, int64_t stride, int64_t n, const float* m, const float* r,
                         float bias, float* y) {
    for (int64_t i = 0; i < n; i += W) {
        V t[K];
        for (int k = 0; k < K; ++k) t[k] = load(tau + k * stride + i);
        store(y + i, output(load(x + i), t, m, r, bias));
    }
}

// Sums of tau g and tau g (x - m).
inline void plane_gradient_sums(const float* x, const float* g, const float* tau, int64_t stride, int64_t n,
                                const float* m, float* sum_g, float* sum_gu) {
    V first[K] = {}, second[K] = {};
    for (int64_t i = 0; i < n; i += W) {
        const V value = load(x + i), gradient = load(g + i);
        for (int k = 0; k < K; ++k) {
            const V weighted = load(tau + k * stride + i) * gradient;
            first[k] += weighted;
            second[k] += weighted * (value - m[k]);
        }
    }
    for (int k = 0; k < K; ++k) {
        sum_g[k] = horizontal_sum(first[k]);
        sum_gu[k] = horizontal_sum(second[k]);
    }
}

// What the gradient of x needs at one channel.
struct Coefficients {
    float m[K], r[K], dm[K], dv[K], mu[K], precision[K];  // r with all factors; dm and dv a unit of mass
};

// Sums of z, z u p and z u^2 p^2 over one plane, for the gradients of the mixture.
struct DensitySums {
    double z[K] = {}, zu[K] = {}, zuu[K] = {};
};

// dx of a channel with posteriors of its own; constant is of dtau.
template <bool WANTED>
void single_gradients(const float* x, const float* g, const float* tau, int64_t stride, int64_t n,
                      const Coefficients& q, const float* constant, float* dx, DensitySums* sums) {
    V z_sum[K] = {}, zu[K] = {}, zuu[K] = {};
    for (int64_t i = 0; i < n; i += W) {
        const V value = load(x + i), gradient = load(g + i);
        V t[K], d[K], direct = {}, average = {};
        for (int k = 0; k < K; ++k) {
            t[k] = load(tau + k * stride + i);
            const V u = value - q.m[k], w = u * q.dv[k];
            const V s = gradient * q.r[k] + q.dm[k] + w;
            d[k] = u * s - constant[k];
            direct += t[k] * (s + w);
            average += t[k] * d[k];
        }
        for (int k = 0; k < K; ++k) {
            const V z = t[k] * (d[k] - average), up = (value - q.mu[k]) * q.precision[k], through = z * up;
            direct -= through;
            if constexpr (WANTED) {
                z_sum[k] += z;
                zu[k] += through;
                zuu[k] += through * up;
            }
        }
        store(dx + i, direct);
    }
    if constexpr (WANTED)
        for (int k = 0; k < K; ++k) {
            sums->z[k] += horizontal_sum(z_sum[k]);
            sums->zu[k] += horizontal_sum(zu[k]);
            sums->zuu[k] += horizontal_sum(zuu[k]);
        }
}

// dtau of a channel, added to its group's; and from all of it the gradients z of log densities, K planes.
inline void add_posterior_gradient(const Coefficients& q, V value, V gradient, V* d) {
    for (int k = 0; k < K; ++k) {
        const V u = value - q.m[k];
        d[k] += u * (gradient * q.r[k] + q.dm[k] + u * q.dv[k]);
    }
}
inline void finish_posterior_gradient(const float* tau, int64_t stride, const float* constant, V* d, float* z,
                                      int64_t z_stride) {
    V t[K], average = {};
    for (int k = 0; k < K; ++k) {
        t[k] = load(tau + k * stride);
        d[k] -= constant[k];
        average += t[k] * d[k];
    }
    for (int k = 0; k < K; ++k) store(z + k * z_stride, t[k] * (d[k] - average));
}
void group_posterior_gradients(const float* x, int64_t x_stride, const float* g, int64_t g_stride, int64_t channels,
                               const float* tau, int64_t stride, int64_t n, const Coefficients* q,
                               const float* constant, float* z, int64_t z_stride) {
    constexpr int R = K <= 4 ? 2 : 1;
    int64_t i = 0;
    for (; i + R * W <= padded(n); i += R * W) {
        V d[R][K] = {};
        for (int64_t c = 0; c < channels; ++c)
            for (int r = 0; r < R; ++r) {
                const int64_t at = i + r * W;
                add_posterior_gradient(q[c], load(x + c * x_stride + at), load(g + c * g_stride + at), d[r]);
            }
        for (int r = 0; r < R; ++r)
            finish_posterior_gradient(tau + i + r * W, stride, constant, d[r], z + i + r * W, z_stride);
    }
    for (; i < n; i += W) {
        V d[K] = {};
        for (int64_t c = 0; c < channels; ++c)
            add_posterior_gradient(q[c], load(x + c * x_stride + i), load(g + c * g_stride + i), d);
        finish_posterior_gradient(tau + i, stride, constant, d, z + i, z_stride);
    }
}

// dx of one of a group's channels: the direct part, with twice dv, less the part through the posteriors.
template <class P, class T>
inline V group_gradient(V value, V gradient, const T* tau, const T* z, const P* m, const P* r, const P* dm,
                        const P* twice_dv, const P* mu, const P* precision, V* through, V* up) {
    V direct = {};
    for (int k = 0; k < K; ++k) {
        const V twice = (value - m[k]) * twice_dv[k];
        direct += tau[k] * (gradient * r[k] + dm[k] + twice);
        up[k] = (value - mu[k]) * precision[k];
        through[k] = z[k] * up[k];
        direct -= through[k];
    }
    return direct;
}
template <bool WANTED>
void group_gradients(const float* x, const float* g, const float* tau, int64_t stride, const float* z,
                     int64_t z_stride, int64_t n, const Coefficients& q, float* dx, float* zu_sum, float* zuu_sum) {
    V zu[K] = {}, zuu[K] = {};
    float twice_dv[K];
    for (int k = 0; k < K; ++k) twice_dv[k] = 2 * q.dv[k];
    for (int64_t i = 0; i < n; i += W) {
        V t[K], its_z[K], through[K], up[K];
        for (int k = 0; k < K; ++k) {
            t[k] = load(tau + k * stride + i);
            its_z[k] = load(z + k * z_stride + i);
        }
        store(dx + i, group_gradient(load(x + i), load(g + i), t, its_z, q.m, q.r, q.dm, twice_dv, q.mu, q.precision,
                                     through, up));
        if constexpr (WANTED)
            for (int k = 0; k < K; ++k) {
                zu[k] += through[k];
                zuu[k] += through[k] * up[k];
            }
    }
    if constexpr (WANTED)
        for (int k = 0; k < K; ++k) {
            zu_sum[k] = horizontal_sum(zu[k]);
            zuu_sum[k] = horizontal_sum(zuu[k]);
        }
}

// ---- The same where the channels of a location lie side by side: what is written is not turned, and what is read a
// square at a time, while its memory is asked for ----

// Whether that pays: of few channels a vector is mostly empty.
inline bool by_rows(const Shape& s, int64_t width) { return s.rows && width >= W; }

// Call at(j) for vectors of a group's channels, the last of which may have some in common with the one before.
template <class At> inline void across(int64_t width, At at) {
    for (int64_t j = 0; j < width; j += W) at(std::min(j, width - W));
}

constexpr int64_t BESIDE = 8;  // locations for which a vector of channels' numbers are read once

// y at n locations c apart; tables (2 K + 1, c) are m, r and the bias from the group's first channel on.
void row_output(const float* x, const float* tau, int64_t stride, int64_t n, int64_t width, int64_t c,
                const float* tables, float* y) {
    for (int64_t start = 0; start < n; start += BESIDE)
        across(width, [&](int64_t j) {
            V q[2 * K + 1];
            for (int i = 0; i < 2 * K + 1; ++i) q[i] = load(tables + i * c + j);
            prefetch_rows(x + start * c + j, c, BESIDE);
            prefetch_written(y + start * c + j, c, BESIDE);
            for (int64_t i = start; i < std::min(start + BESIDE, n); ++i) {
                float t[K];
                for (int k = 0; k < K; ++k) t[k] = tau[k * stride + i];
                store(y + i * c + j, output(load(x + i * c + j), t, q, q + K, q[2 * K]));
            }
        });
}

// W channels' planes of W locations in an L1 cache, from rows c apart; zero beyond so many locations.
inline void square(const float* from, int64_t c, int64_t locations, float* to) {
    if (locations >= W)
        transpose(from, c, to, W);
    else
        for (int64_t j = 0; j < W; ++j)
            for (int64_t i = 0; i < W; ++i) to[j * W + i] = i < locations ? from[i * c + j] : 0.0f;
}

// plane_gradient_sums of a group's channels: m (K planes, c apart), sums (2 K planes of width); room is 2 K W floats a
// channel.
void row_gradient_sums(const float* x, const float* g, const float* tau, int64_t stride, int64_t n, int64_t width,
                       int64_t c, const float* m, float* sums, float* room) {
    constexpr int64_t R = 4;  // squares for which a channel's sums are read once
    alignas(64) float values[R * W * W], gradients[R * W * W];
    std::fill(room, room + 2 * K * W * width, 0.0f);
    for (int64_t start = 0; start < n; start += R * W)
        for (int64_t next = 0; next < width; next += W) {
            const int64_t squares = std::min(R, (n - start + W - 1) / W), j = std::min(next, width - W);
            for (int64_t r = 0; r < squares; ++r) {
                const int64_t i = start + r * W, at = i * c + j;
                square(x + at, c, n - i, values + r * W * W);
                square(g + at, c, n - i, gradients + r * W * W);
                prefetch_rows(x + at, c, W);
                prefetch_rows(g + at, c, W);
            }
            for (int64_t channel = next - j; channel < W; ++channel) {
                float* const own = room + (j + channel) * 2 * K * W;
                V sum_g[K], sum_gu[K];
                for (int k = 0; k < K; ++k) {
                    sum_g[k] = load(own + k * W);
                    sum_gu[k] = load(own + (K + k) * W);
                }
                for (int64_t r = 0; r < squares; ++r) {
                    const int64_t at = (r * W + channel) * W;
                    const V value = load(values + at), gradient = load(gradients + at);
                    for (int k = 0; k < K; ++k) {
                        const V weighted = load(tau + k * stride + start + r * W) * gradient;
                        sum_g[k] += weighted;
                        sum_gu[k] += weighted * (value - m[k * c + j + channel]);
                    }
                }
                for (int k = 0; k < K; ++k) {
                    store(own + k * W, sum_g[k]);
                    store(own + (K + k) * W, sum_gu[k]);
                }
            }
        }
    for (int64_t j = 0; j < width; ++j)
        for (int i = 0; i < 2 * K; ++i) sums[i * width + j] = horizontal_sum(load(room + (j * 2 * K + i) * W));
}

// group_posterior_gradients from rows of up to W locations; z (K planes of W).
void row_posterior_gradients(const float* x, const float* g, int64_t width, int64_t c, const float* tau, int64_t stride,
                             int64_t n, const Coefficients* q, const float* constant, float* z) {
    alignas(64) float values[W * W], gradients[W * W];
    V d[K] = {};
    for (int64_t next = 0; next < width; next += W) {
        const int64_t j = std::min(next, width - W);
        square(x + j, c, n, values);
        square(g + j, c, n, gradients);
        prefetch_rows(x + j, c, W);
        prefetch_rows(g + j, c, W);
        for (int64_t channel = next - j; channel < W; ++channel)
            add_posterior_gradient(q[j + channel], load(values + channel * W), load(gradients + channel * W), d);
    }
    finish_posterior_gradient(tau, stride, constant, d, z, W);
}

// dx at n locations c apart; tables (6 K, c) are m, r, dm, twice dv, mu and the precision.
void row_gradients(const float* x, const float* g, const float* tau, int64_t stride, const float* z, int64_t z_stride,
                   int64_t n, int64_t width, int64_t c, const float* tables, float* dx) {
    for (int64_t start = 0; start < n; start += BESIDE)
        across(width, [&](int64_t j) {
            V q[6 * K], through[K], up[K];
            for (int i = 0; i < 6 * K; ++i) q[i] = load(tables + i * c + j);
            prefetch_written(dx + start * c + j, c, BESIDE);
            for (int64_t i = start; i < std::min(start + BESIDE, n); ++i) {
                float t[K], its_z[K];
                for (int k = 0; k < K; ++k) {
                    t[k] = tau[k * stride + i];
                    its_z[k] = z[k * z_stride + i];
                }
                const int64_t at = i * c + j;
                store(dx + at, group_gradient(load(x + at), load(g + at), t, its_z, q, q + K, q + 2 * K, q + 3 * K,
                                              q + 4 * K, q + 5 * K, through, up));
            }
        });
}

// ---- Layers ----

struct Options {
    float eps, floor, kappa;
    int64_t groups;
    bool stored;   // log and var are logits and log-variances
    bool learned;  // the mixture normalises (Eq. 15), not the batch's moments
    int threads;
};

// What forward leaves: tables (K, C) of the mixture and of the batch's moments, masses (K, G), log weights (K,).
struct State {
    float *mu, *precision, *m, *v, *mass, *log_lambda;
    State(float* data, int64_t c, int64_t g)
        : mu(data), precision(mu + K * c), m(precision + K * c), v(m + K * c), mass(v + K * c), log_lambda(mass + K * g) {}
};

void fill_mixture(const State& s, const float* log, const float* mean, const float* var, int64_t c, const Options& o) {
    double most = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int k = 0; k < K; ++k) most = std::max(most, static_cast<double>(log[k]));
    for (int k = 0; k < K; ++k) sum += std::exp(log[k] - most);
    for (int k = 0; k < K; ++k) {
        const double own = o.stored ? log[k] - most - std::log(sum) : log[k];
        s.log_lambda[k] = own < o.floor ? o.floor : static_cast<float>(own);
    }
    for (int64_t i = 0; i < K * c; ++i) {
        s.mu[i] = mean[i];
        s.precision[i] = 1.0f / ((o.stored ? std::exp(var[i]) : var[i]) + o.eps);
    }
}

// The densities of the channels from first on, and the constants (to the base of two) of their group.
void densities(const State& s, int64_t c, int64_t first, int64_t channels, Density* q, float* constant) {
    for (int k = 0; k < K; ++k) {
        double log = s.log_lambda[k];
        for (int64_t j = 0; j < channels; ++j) {
            const float p = s.precision[k * c + first + j];
            q[j].mu[k] = s.mu[k * c + first + j];
            q[j].a[k] = static_cast<float>(-0.5 * LOG2_E * p);
            log += 0.5 * std::log(p);
        }
        constant[k] = static_cast<float>(LOG2_E * log);
    }
}

inline float lambda_factor(const State& s, int k, float kappa) { return std::exp(-0.5f * s.log_lambda[k]) * kappa; }

// Factors of (x - m) tau at a channel: all that a component is multiplied by.
void output_factors(const State& s, int64_t c, int64_t channel, const float* weight, const Options& o, float* m,
                    float* r) {
    for (int k = 0; k < K; ++k) {
        const int64_t at = k * c + channel;
        m[k] = o.learned ? s.mu[at] : s.m[at];
        const float rstd = o.learned ? std::sqrt(s.precision[at]) : 1.0f / std::sqrt(s.v[at] + o.eps);
        r[k] = rstd * lambda_factor(s, k, o.kappa) * (weight ? weight[channel] : 1.0f);
    }
}

int threads_for(const Shape& s, int threads) { return s.locations() * s.c < SMALL ? 1 : threads; }

// Channels that are brought into planes together: as many as share vectors of memory.
int64_t block_of(const Shape& s) { return s.rows ? W : 1; }

void forward_single(const float* x, float* y, const Shape& s, const State& state, const float* weight,
                    const float* bias, const Options& o) {
    const int64_t size = s.locations(), block = block_of(s), blocks = (s.c + block - 1) / block;
    const bool resident = 4 * padded(size) * (block + K) <= RESIDENT;
    const int64_t planes = padded(resident ? size : std::min(size, CHUNK));
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(s, o.threads))
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = b * block, channels = std::min(block, s.c - first);
        float* const values = own_buffer.reserve((block + K) * planes);
        float* const tau = values + block * planes;
        Density q[W];
        float constant[W][K], origin[W], m[K], r[K], mass[K], mean[K], m2[K];
        for (int64_t j = 0; j < channels; ++j) {
            densities(state, s.c, first + j, 1, q + j, constant[j]);
            origin[j] = s.first(x, first + j);
        }
        const auto find = [&](int64_t j, const float* plane, int64_t n, float* t) {
            posteriors(plane, 0, 1, q + j, constant[j], n, t, planes, mass);
        };
        const auto average = [&](int64_t j, const float* plane, const float* t, int64_t n, Joined* joined) {
            plane_moments(plane, t, planes, n, origin[j], mass, mean, m2);
            for (int k = 0; k < K; ++k) joined[k].add(mass[k], mean[k], m2[k]);
        };
        const auto keep = [&](int64_t j, const Joined* joined) {
            for (int k = 0; k < K; ++k) {
                const int64_t at = k * s.c + first + j;
                state.mass[at] = static_cast<float>(joined[k].mass);
                state.m[at] = joined[k].mean_from(origin[j]);
                state.v[at] = joined[k].variance();
            }
        };
        const auto chunks = [&](auto visit) {
            for (int64_t start = 0; start < size; start += CHUNK) visit(start, std::min(CHUNK, size - start));
        };
        const auto output = [&](int64_t j, float* plane, const float* t, int64_t n) {
            output_factors(state, s.c, first + j, weight, o, m, r);
            plane_output(plane, t, planes, n, m, r, bias ? bias[first + j] : 0.0f, plane);
        };
        if (resident) {
            gather(x, s, first, channels, 0, size, values, planes);
            for (int64_t j = 0; j < channels; ++j) {
                float* const plane = values + j * planes;
                Joined joined[K];
                chunks([&](int64_t start, int64_t n) {
                    find(j, plane + start, n, tau + start);
                    if (!o.learned) average(j, plane + start, tau + start, n, joined);
                });
                if (!o.learned) keep(j, joined);
                output(j, plane, tau, size);
            }
            scatter(values, planes, y, s, first, channels, 0, size);
        } else {
            Joined joined[W][K];
            if (!o.learned) {
                chunks([&](int64_t start, int64_t n) {
                    gather(x, s, first, channels, start, n, values, planes);
                    for (int64_t j = 0; j < channels; ++j) {
                        find(j, values + j * planes, n, tau);
                        average(j, values + j * planes, tau, n, joined[j]);
                    }
                });
                for (int64_t j = 0; j < channels; ++j) keep(j, joined[j]);
            }
            chunks([&](int64_t start, int64_t n) {
                gather(x, s, first, channels, start, n, values, planes);
                for (int64_t j = 0; j < channels; ++j) {
                    find(j, values + j * planes, n, tau);
                    output(j, values + j * planes, tau, n);
                }
                scatter(values, planes, y, s, first, channels, start, n);
            });
        }
    }
}

// How a batch is cut for groups of channels: chunks of so many locations.
struct Cut {
    int64_t size, length, count, planes;
    bool direct;  // planes are read where they are
    Cut(const Shape& s, int64_t width) {  // of x and its gradient, so that both passes cut alike
        size = s.locations();
        const bool samples = s.l % W == 0 && s.l >= 256;  // no chunk is of two: in any layout, for the same sums
        const int64_t fits = std::max<int64_t>(4 * W, std::min<int64_t>(512, JOINT / (8 * width)) / W * W);
        direct = samples && !s.rows;
        length = std::min(fits, padded(size));
        if (samples) {
            const int64_t parts = (s.l + fits - 1) / fits;
            length = padded((s.l + parts - 1) / parts);
            while (s.l % length) length += W;
        }
        count = (size + length - 1) / length;
        planes = padded(length);
    }
    int64_t at(int64_t chunk) const { return chunk * length; }
    int64_t n(int64_t chunk) const { return std::min(length, size - at(chunk)); }
};

// The planes of a chunk: where they are, or brought into a buffer.
struct Planes {
    const float* data;
    int64_t stride;
    Planes(const float* t, const Shape& s, const Cut& cut, int64_t chunk, int64_t channel, int64_t channels,
           float* buffer) {
        if (cut.direct) {
            const int64_t start = cut.at(chunk);
            data = t + ((start / s.l) * s.c + channel) * s.l + start % s.l;
            stride = s.l;
        } else {
            gather(t, s, channel, channels, cut.at(chunk), cut.n(chunk), buffer, cut.planes);
            data = buffer;
            stride = cut.planes;
        }
    }
};

// Where planes are written: to their place, or to a buffer that finish brings there.
struct Target {
    float *t, *data;
    int64_t stride;
    Target(float* t, const Shape& s, const Cut& cut, int64_t chunk, int64_t channel, float* buffer) : t(t) {
        const int64_t start = cut.at(chunk);
        data = cut.direct ? t + ((start / s.l) * s.c + channel) * s.l + start % s.l : buffer;
        stride = cut.direct ? s.l : cut.planes;
    }
    void finish(const Shape& s, const Cut& cut, int64_t chunk, int64_t channel, int64_t channels) {
        if (!cut.direct) scatter(data, stride, t, s, channel, channels, cut.at(chunk), cut.n(chunk));
    }
};

// tau: room for the posteriors of all chunks, (groups, chunks, K, planes), which are kept for the backward pass.
void forward_groups(const float* x, float* y, float* tau, const Shape& s, const State& state, const float* weight,
                    const float* bias, const Options& o) {
    const int64_t width = s.c / o.groups;
    const Cut cut(s, width);
    const int64_t items = o.groups * cut.count, sums = K * (1 + 2 * width);
    // densities of all channels, constants of groups, m, r and bias (2 K + 1, C), then each item's masses, means and sums
    // of squares
    float* const tables =
        shared_buffer.reserve(2 * K * s.c + K * o.groups + (2 * K + 1) * s.c + (o.learned ? 0 : items * sums));
    Density* const q = reinterpret_cast<Density*>(tables);
    float* const constants = tables + 2 * K * s.c;
    float* const factors = constants + K * o.groups;
    float* const found = factors + (2 * K + 1) * s.c;
#pragma omp parallel num_threads(threads_for(s, o.threads))
    {
        float* const buffer = own_buffer.reserve(width * cut.planes + K * cut.planes);
        float* const some = buffer + width * cut.planes;
#pragma omp for schedule(static)
        for (int64_t group = 0; group < o.groups; ++group)
            densities(state, s.c, group * width, width, q + group * width, constants + K * group);
        const auto posterior = [&](int64_t item, const Planes& p, float* t, float* mass) {
            const int64_t group = item / cut.count, n = cut.n(item % cut.count);
            posteriors(p.data, p.stride, width, q + group * width, constants + K * group, n, t, cut.planes, mass);
        };
        if (!o.learned) {
#pragma omp for schedule(dynamic)
            for (int64_t item = 0; item < items; ++item) {
                const int64_t first = item / cut.count * width, chunk = item % cut.count;
                const Planes p(x, s, cut, chunk, first, width, buffer);
                float *const t = tau + item * K * cut.planes, *const mass = found + item * sums;
                float* const means = mass + K;
                posterior(item, p, t, mass);
                for (int64_t j = 0; j < width; ++j) {
                    float mean[K], m2[K];
                    const float origin = s.first(x, first + j);
                    plane_moments(p.data + j * p.stride, t, cut.planes, cut.n(chunk), origin, mass, mean, m2);
                    for (int k = 0; k < K; ++k) {
                        means[k * width + j] = mean[k];
                        means[(K + k) * width + j] = m2[k];
                    }
                }
            }
#pragma omp for schedule(static)
            for (int64_t channel = 0; channel < s.c; ++channel) {
                const int64_t group = channel / width, j = channel % width;
                Joined joined[K];
                for (int64_t chunk = 0; chunk < cut.count; ++chunk) {
                    const float* const mass = found + (group * cut.count + chunk) * sums;
                    for (int k = 0; k < K; ++k)
                        joined[k].add(mass[k], mass[K + k * width + j], mass[K + (K + k) * width + j]);
                }
                for (int k = 0; k < K; ++k) {
                    state.m[k * s.c + channel] = joined[k].mean_from(s.first(x, channel));
                    state.v[k * s.c + channel] = joined[k].variance();
                    if (!j) state.mass[k * o.groups + group] = static_cast<float>(joined[k].mass);
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t channel = 0; channel < s.c; ++channel) {
            float m[K], r[K], *const own = factors + channel;
            output_factors(state, s.c, channel, weight, o, m, r);
            for (int k = 0; k < K; ++k) {
                own[k * s.c] = m[k];
                own[(K + k) * s.c] = r[k];
            }
            own[2 * K * s.c] = bias ? bias[channel] : 0.0f;
        }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < items; ++item) {
            const int64_t first = item / cut.count * width, chunk = item % cut.count, n = cut.n(chunk);
            float mass[K], m[K], r[K];
            float* t = tau + item * K * cut.planes;
            if (by_rows(s, width)) {
                if (o.learned) posterior(item, Planes(x, s, cut, chunk, first, width, buffer), t = some, mass);
                const int64_t at = cut.at(chunk) * s.c + first;
                row_output(x + at, t, cut.planes, n, width, s.c, factors + first, y + at);
                continue;
            }
            const Planes p(x, s, cut, chunk, first, width, buffer);
            if (o.learned) posterior(item, p, t = some, mass);
            Target target(y, s, cut, chunk, first, buffer);
            for (int64_t j = 0; j < width; ++j) {
                const float* const own = factors + first + j;
                for (int k = 0; k < K; ++k) {
                    m[k] = own[k * s.c];
                    r[k] = own[(K + k) * s.c];
                }
                plane_output(p.data + j * p.stride, t, cut.planes, n, m, r, own[2 * K * s.c],
                             target.data + j * target.stride);
            }
            target.finish(s, cut, chunk, first, width);
        }
    }
}

// What a backward pass leaves: of weight and bias (2, C), of mean and variance (2, K, C), of log weights (K, C) parts.
struct Gradients {
    float *weight, *bias, *mean, *var, *log;
};

// From a channel's sums of tau g and tau g (x - m), over all the batch, to what dx needs; returns its part of constant.
void coefficients(const State& s, int64_t c, int64_t channel, const float* mass, const double* sum_g,
                  const double* sum_gu, const float* weight, const Options& o, const Gradients& out, Coefficients& q,
                  double* constant) {
    double dweight = 0, dbias = 0;
    for (int k = 0; k < K; ++k) {
        const int64_t at = k * c + channel;
        const float r = o.learned ? std::sqrt(s.precision[at]) : 1.0f / std::sqrt(s.v[at] + o.eps);
        const float lambda = lambda_factor(s, k, o.kappa);
        const float scale = lambda * (weight ? weight[channel] : 1.0f), count = std::max(mass[k], TINY);
        const float g = static_cast<float>(sum_g[k]), gu = static_cast<float>(sum_gu[k]);
        q.m[k] = o.learned ? s.mu[at] : s.m[at];
        q.r[k] = scale * r;
        q.dm[k] = o.learned ? 0.0f : -r * scale * g / count;
        q.dv[k] = o.learned ? 0.0f : -0.5f * r * r * r * scale * gu / count;
        q.mu[k] = s.mu[at];
        q.precision[k] = s.precision[at];
        constant[k] = o.learned ? 0.0 : static_cast<double>(q.dv[k]) * s.v[at];
        dweight += static_cast<double>(r) * gu * lambda;
        dbias += g;
        if (out.log) out.log[at] = -0.5f * q.r[k] * gu;
    }
    if (out.weight) {
        out.weight[channel] = static_cast<float>(dweight);
        out.bias[channel] = static_cast<float>(dbias);
    }
}

// The mixture's gradients at a channel; where it normalises as well, through that too: sums of tau g and tau g (x - mu).
void keep_parameters(const State& s, int64_t c, int64_t channel, const double* z, const double* zu, const double* zuu,
                     const double* sum_g, const double* sum_gu, const float* r, bool first, const Options& o,
                     const Gradients& out) {
    for (int k = 0; k < K; ++k) {
        const int64_t at = k * c + channel;
        const double p = s.precision[at], of_mean = o.learned ? r[k] * sum_g[k] : 0;
        const double of_var = o.learned ? r[k] * sum_gu[k] * p : 0;
        out.mean[at] = static_cast<float>(zu[k] - of_mean);
        out.var[at] = static_cast<float>(0.5 * (zuu[k] - of_var - z[k] * p));
        if (first) out.log[at] += static_cast<float>(z[k]);
    }
}

template <bool WANTED>
void backward_single(const float* x, const float* g, float* dx, const Shape& s, const State& state,
                     const float* weight, const Options& o, const Gradients& out) {
    const int64_t size = s.locations(), block = block_of(s), blocks = (s.c + block - 1) / block;
    const bool resident = 4 * padded(size) * (2 * block + K) <= 2 * RESIDENT;
    const int64_t planes = padded(resident ? size : std::min(size, CHUNK));
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(s, o.threads))
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = b * block, channels = std::min(block, s.c - first);
        float* const values = own_buffer.reserve((2 * block + K) * planes);
        float *const gradients = values + block * planes, *const tau = gradients + block * planes;
        Density q[W];
        Coefficients coefficient[W];
        float constant[W][K], own_mass[K], part_g[K], part_gu[K], of_tau[W][K];
        double sum_g[W][K] = {}, sum_gu[W][K] = {};
        DensitySums sums[W];
        for (int64_t j = 0; j < channels; ++j) densities(state, s.c, first + j, 1, q + j, constant[j]);
        const auto chunks = [&](auto visit) {
            for (int64_t start = 0; start < size; start += CHUNK) visit(start, std::min(CHUNK, size - start));
        };
        const auto bring = [&](int64_t start, int64_t n) {
            gather(x, s, first, channels, start, n, values, planes);
            gather(g, s, first, channels, start, n, gradients, planes);
        };
        const auto find = [&](int64_t j, int64_t offset, int64_t n, float* t) {
            posteriors(values + j * planes + offset, 0, 1, q + j, constant[j], n, t, planes, own_mass);
        };
        const auto add = [&](int64_t j, int64_t offset, int64_t n, const float* t) {
            float m[K];
            for (int k = 0; k < K; ++k) m[k] = (o.learned ? state.mu : state.m)[k * s.c + first + j];
            const int64_t at = j * planes + offset;
            plane_gradient_sums(values + at, gradients + at, t, planes, n, m, part_g, part_gu);
            for (int k = 0; k < K; ++k) {
                sum_g[j][k] += part_g[k];
                sum_gu[j][k] += part_gu[k];
            }
        };
        const auto settle = [&](int64_t j) {
            float mass[K];
            double each[K];
            for (int k = 0; k < K; ++k) mass[k] = state.mass[k * s.c + first + j];
            coefficients(state, s.c, first + j, mass, sum_g[j], sum_gu[j], weight, o, out, coefficient[j], each);
            for (int k = 0; k < K; ++k) of_tau[j][k] = static_cast<float>(each[k]);
        };
        const auto write = [&](int64_t j, int64_t offset, int64_t n, const float* t) {
            const int64_t at = j * planes + offset;
            single_gradients<WANTED>(values + at, gradients + at, t, planes, n, coefficient[j], of_tau[j], values + at,
                                     sums + j);
        };
        if (resident) {
            bring(0, size);
            for (int64_t j = 0; j < channels; ++j) {
                chunks([&](int64_t start, int64_t n) {
                    find(j, start, n, tau + start);
                    add(j, start, n, tau + start);
                });
                settle(j);
                chunks([&](int64_t start, int64_t n) { write(j, start, n, tau + start); });
            }
            scatter(values, planes, dx, s, first, channels, 0, size);
        } else {
            chunks([&](int64_t start, int64_t n) {
                bring(start, n);
                for (int64_t j = 0; j < channels; ++j) {
                    find(j, 0, n, tau);
                    add(j, 0, n, tau);
                }
            });
            for (int64_t j = 0; j < channels; ++j) settle(j);
            chunks([&](int64_t start, int64_t n) {
                bring(start, n);
                for (int64_t j = 0; j < channels; ++j) {
                    find(j, 0, n, tau);
                    write(j, 0, n, tau);
                }
                scatter(values, planes, dx, s, first, channels, start, n);
            });
        }
        if constexpr (WANTED)
            for (int64_t j = 0; j < channels; ++j)
                keep_parameters(state, s.c, first + j, sums[j].z, sums[j].zu, sums[j].zuu, sum_g[j], sum_gu[j],
                                coefficient[j].r, true, o, out);
    }
}

template <bool WANTED>
void backward_groups(const float* x, const float* g, const float* tau, float* dx, const Shape& s, const State& state,
                     const float* weight, const Options& o, const Gradients& out) {
    const int64_t width = s.c / o.groups;
    const Cut cut(s, width);
    const int64_t items = o.groups * cut.count, sums = K * (1 + 2 * width), again = o.learned ? K * cut.planes : 0;
    constexpr int64_t FLOATS = sizeof(Coefficients) / sizeof(float);
    float* const shared =
        shared_buffer.reserve(2 * FLOATS * s.c + 6 * K * s.c + K * o.groups + 2 * K * s.c + items * (sums + again));
    Coefficients* const q = reinterpret_cast<Coefficients*>(shared);
    double* const each = reinterpret_cast<double*>(shared + FLOATS * s.c);  // of dtau's constants, (C, K)
    double *const all_g = each + K * s.c, *const all_gu = all_g + K * s.c;  // over the batch, (C, K)
    Density* const density = reinterpret_cast<Density*>(all_gu + K * s.c);
    float* const constants = reinterpret_cast<float*>(density + s.c);
    float* const found = constants + K * o.groups;
    float* const posterior = found + items * sums;  // found again where it was not kept
    float* const rows = posterior + items * again;  // tables of row_gradients
    const auto tau_of = [&](int64_t item) { return o.learned ? posterior + item * again : tau + item * K * cut.planes; };
    const auto total_of = [&](int64_t channel, int64_t plane, double* sum) {  // over chunks, of planes in found
        const int64_t group = channel / width, j = channel % width;
        for (int k = 0; k < K; ++k) sum[k] = 0;
        for (int64_t chunk = 0; chunk < cut.count; ++chunk)
            for (int k = 0; k < K; ++k) sum[k] += found[(group * cut.count + chunk) * sums + K + (plane * K + k) * width + j];
    };
#pragma omp parallel num_threads(threads_for(s, o.threads))
    {
        float* const z = own_buffer.reserve(K * cut.planes + std::max(2 * width * cut.planes, 2 * K * W * width));
        float *const values = z + K * cut.planes, *const gradients = values + width * cut.planes;
        if (o.learned) {
#pragma omp for schedule(static)
            for (int64_t group = 0; group < o.groups; ++group)
                densities(state, s.c, group * width, width, density + group * width, constants + K * group);
        }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < items; ++item) {
            const int64_t first = item / cut.count * width, chunk = item % cut.count;
            float* const kept = found + item * sums + K;
            if (by_rows(s, width) && !o.learned) {
                const int64_t at = cut.at(chunk) * s.c + first;
                row_gradient_sums(x + at, g + at, tau_of(item), cut.planes, cut.n(chunk), width, s.c, state.m + first,
                                  kept, values);
                continue;
            }
            const Planes px(x, s, cut, chunk, first, width, values), pg(g, s, cut, chunk, first, width, gradients);
            if (o.learned) {
                float mass[K];
                posteriors(px.data, px.stride, width, density + first, constants + K * (item / cut.count), cut.n(chunk),
                           posterior + item * again, cut.planes, mass);
            }
            for (int64_t j = 0; j < width; ++j) {
                float m[K], sum_g[K], sum_gu[K];
                for (int k = 0; k < K; ++k) m[k] = (o.learned ? state.mu : state.m)[k * s.c + first + j];
                plane_gradient_sums(px.data + j * px.stride, pg.data + j * pg.stride, tau_of(item), cut.planes,
                                    cut.n(chunk), m, sum_g, sum_gu);
                for (int k = 0; k < K; ++k) {
                    kept[k * width + j] = sum_g[k];
                    kept[(K + k) * width + j] = sum_gu[k];
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t channel = 0; channel < s.c; ++channel) {
            float mass[K];
            double *const sum_g = all_g + K * channel, *const sum_gu = all_gu + K * channel;
            for (int k = 0; k < K; ++k) mass[k] = state.mass[k * o.groups + channel / width];
            total_of(channel, 0, sum_g);
            total_of(channel, 1, sum_gu);
            coefficients(state, s.c, channel, mass, sum_g, sum_gu, weight, o, out, q[channel], each + K * channel);
            const float* const own = reinterpret_cast<const float*>(q + channel);
            for (int i = 0; i < FLOATS; ++i) rows[i * s.c + channel] = own[i] * (i / K == 3 ? 2 : 1);
        }
#pragma omp for schedule(static)
        for (int64_t group = 0; group < o.groups; ++group)
            for (int k = 0; k < K; ++k) {
                double sum = 0;
                for (int64_t j = 0; j < width; ++j) sum += each[K * (group * width + j) + k];
                constants[K * group + k] = static_cast<float>(sum);
            }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < items; ++item) {
            const int64_t group = item / cut.count, first = group * width, chunk = item % cut.count, n = cut.n(chunk);
            const float* const t = tau_of(item);
            if (by_rows(s, width) && !WANTED) {
                const int64_t at = cut.at(chunk) * s.c + first;
                for (int64_t i = 0; i < n; i += W) {  // while its rows are in cache
                    const int64_t some = std::min<int64_t>(W, n - i), its = at + i * s.c;
                    row_posterior_gradients(x + its, g + its, width, s.c, t + i, cut.planes, some, q + first,
                                            constants + K * group, z);
                    row_gradients(x + its, g + its, t + i, cut.planes, z, W, some, width, s.c, rows + first, dx + its);
                }
                continue;
            }
            const Planes px(x, s, cut, chunk, first, width, values), pg(g, s, cut, chunk, first, width, gradients);
            group_posterior_gradients(px.data, px.stride, pg.data, pg.stride, width, t, cut.planes, n, q + first,
                                      constants + K * group, z, cut.planes);
            float* const kept = found + item * sums;
            if constexpr (WANTED)
                for (int k = 0; k < K; ++k) {
                    V sum = {};
                    for (int64_t i = 0; i < n; i += W) sum += load(z + k * cut.planes + i);
                    kept[k] = horizontal_sum(sum);
                }
            Target target(dx, s, cut, chunk, first, values);
            for (int64_t j = 0; j < width; ++j) {
                float zu[K], zuu[K];
                group_gradients<WANTED>(px.data + j * px.stride, pg.data + j * pg.stride, t, cut.planes, z, cut.planes,
                                        n, q[first + j], target.data + j * target.stride, zu, zuu);
                if constexpr (WANTED)
                    for (int k = 0; k < K; ++k) {
                        kept[K + k * width + j] = zu[k];
                        kept[K + (K + k) * width + j] = zuu[k];
                    }
            }
            target.finish(s, cut, chunk, first, width);
        }
        if constexpr (WANTED) {
#pragma omp for schedule(static)
            for (int64_t channel = 0; channel < s.c; ++channel) {
                double sum_z[K] = {}, zu[K], zuu[K];
                total_of(channel, 0, zu);
                total_of(channel, 1, zuu);
                for (int64_t chunk = 0; chunk < cut.count; ++chunk)
                    for (int k = 0; k < K; ++k) sum_z[k] += found[(channel / width * cut.count + chunk) * sums + k];
                keep_parameters(state, s.c, channel, sum_z, zu, zuu, all_g + K * channel, all_gu + K * channel,
                                q[channel].r, channel % width == 0, o, out);
            }
        }
    }
}

// Steps of EM on points in planes (C, stride), from a mixture that they change in place.
void fit_planes(const float* points, int64_t stride, int64_t count, int64_t c, float* weight, float* mean, float* var,
                const float* least, float empty, int steps, const Options& o, float* room) {
    const int64_t width = c / o.groups, length = width == 1 ? CHUNK : std::max<int64_t>(4 * W, JOINT / (4 * width) / W * W);
    const int64_t chunks = (count + length - 1) / length, items = o.groups * chunks, sums = K * (1 + 2 * width);
    const State s(room, c, o.groups);
    Density* const q = reinterpret_cast<Density*>(room + 4 * K * c + K * o.groups + K);
    float* const constants = reinterpret_cast<float*>(q + c);
    float* const found = constants + K * o.groups;
#pragma omp parallel num_threads(o.threads)
    for (int step = 0; step < steps; ++step) {
        float* const tau = own_buffer.reserve(K * std::min(length, stride));
#pragma omp single
        for (int k = 0; k < K; ++k) s.log_lambda[k] = std::log(weight[k]);
#pragma omp for schedule(static)
        for (int64_t group = 0; group < o.groups; ++group) {
            for (int k = 0; k < K; ++k)
                for (int64_t i = k * c + group * width; i < k * c + (group + 1) * width; ++i) {
                    s.mu[i] = mean[i];
                    s.precision[i] = 1.0f / (var[i] + o.eps);
                }
            densities(s, c, group * width, width, q + group * width, constants + K * group);
        }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < items; ++item) {
            const int64_t group = item / chunks, first = group * width, start = item % chunks * length;
            const int64_t n = std::min(length, count - start), room_of = std::min(length, stride);
            const float* const planes = points + first * stride + start;
            float *const mass = found + item * sums, *const means = mass + K;
            posteriors(planes, stride, width, q + first, constants + K * group, n, tau, room_of, mass);
            for (int64_t j = 0; j < width; ++j) {
                float its_mean[K], m2[K];
                plane_moments(planes + j * stride, tau, room_of, n, points[(first + j) * stride], mass, its_mean, m2);
                for (int k = 0; k < K; ++k) {
                    means[k * width + j] = its_mean[k];
                    means[(K + k) * width + j] = m2[k];
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t channel = 0; channel < c; ++channel) {
            const int64_t group = channel / width, j = channel % width;
            Joined joined[K];
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                const float* const mass = found + (group * chunks + chunk) * sums;
                for (int k = 0; k < K; ++k)
                    joined[k].add(mass[k], mass[K + k * width + j], mass[K + (K + k) * width + j]);
            }
            for (int k = 0; k < K; ++k) {
                const int64_t at = k * c + channel;
                if (!j) s.mass[k * o.groups + group] = static_cast<float>(joined[k].mass);
                if (joined[k].mass < empty) continue;
                mean[at] = joined[k].mean_from(points[channel * stride]);
                const float own = joined[k].variance();
                var[at] = own < least[channel] ? least[channel] : own;
            }
        }
#pragma omp single
        for (int k = 0; k < K; ++k) {
            double mass = 0;
            for (int64_t group = 0; group < o.groups; ++group) mass += s.mass[k * o.groups + group];
            const float share = static_cast<float>(mass / o.groups / count);
            weight[k] = share < TINY ? TINY : share;
        }
    }
}

bool finite(const float* t, int64_t n) {
    float sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += t[i] * 0.0f;
    return sum == 0;
}

}  // namespace

extern "C" {

// Floats of a state, and of the posteriors that forward keeps.
int64_t state_size(int64_t c, int64_t groups) { return 4 * K * c + K * groups + K; }
int64_t posteriors_size(int64_t n, int64_t c, int64_t l, int rows, int64_t groups) {
    if (groups == c) return 0;
    const Cut cut(Shape{n, c, l, rows != 0}, c / groups);
    return groups * cut.count * K * cut.planes;
}

void forward(const float* x, float* y, float* state, float* tau, const float* log, const float* mean, const float* var,
             const float* weight, const float* bias, int64_t n, int64_t c, int64_t l, int rows, int64_t groups,
             float eps, float floor, float kappa, int stored, int learned, int threads) {
    const Shape s{n, c, l, rows != 0};
    const Options o{eps, floor, kappa, groups, stored != 0, learned != 0, threads};
    const State kept(state, c, groups);
    fill_mixture(kept, log, mean, var, c, o);
    if (groups == c)
        forward_single(x, y, s, kept, weight, bias, o);
    else
        forward_groups(x, y, tau, s, kept, weight, bias, o);
}

// affine (2, C) of weight and bias; rows (2, K, C) of mean and variance with log (K, C), parts of the log weights'.
void backward(const float* x, const float* g, float* dx, float* state, const float* tau, const float* weight,
              float* affine, float* rows_out, float* log, int64_t n, int64_t c, int64_t l, int rows, int64_t groups,
              float eps, float kappa, int learned, int threads) {
    const Shape s{n, c, l, rows != 0};
    const Options o{eps, 0, kappa, groups, false, learned != 0, threads};
    const State kept(state, c, groups);
    const Gradients out{affine, affine ? affine + c : nullptr, rows_out, rows_out ? rows_out + K * c : nullptr, log};
    if (groups == c)
        (rows_out ? backward_single<true> : backward_single<false>)(x, g, dx, s, kept, weight, o, out);
    else
        (rows_out ? backward_groups<true> : backward_groups<false>)(x, g, tau, dx, s, kept, weight, o, out);
}

// mixture.moved, in place: a stored mixture moves towards a batch's moments, unless one of these is not finite.
void move_averages(float* logits, float* mean, float* log_var, const float* state, int64_t c, int64_t groups,
                   float momentum, int paper, float min_weight, int shared) {
    const State s(const_cast<float*>(state), c, groups);
    if (!finite(s.m, 2 * K * c + K * groups)) return;
    float weight[K], most = logits[0], sum = 0;
    for (int k = 1; k < K; ++k) most = std::max(most, logits[k]);
    for (int k = 0; k < K; ++k) sum += weight[k] = std::exp(logits[k] - most);
    double share[K] = {};
    for (int64_t group = 0; group < groups; ++group) {
        double mass = 0;
        for (int k = 0; k < K; ++k) mass += s.mass[k * groups + group];
        for (int k = 0; k < K; ++k) share[k] += s.mass[k * groups + group] / std::max(mass, 1e-12);
    }
    for (int k = 0; k < K; ++k) {
        weight[k] /= sum;
        weight[k] += momentum * (static_cast<float>(share[k] / groups) - weight[k]);
        weight[k] = std::max(weight[k], min_weight);
        logits[k] = std::log(weight[k]);
    }
    float all = 0;
    for (int k = 0; k < K; ++k) all += weight[k];
    const int64_t width = c / groups;
    for (int64_t channel = 0; channel < c; ++channel) {
        const int64_t group = channel / width;
        float mass = 0, var[K], pooled = 0;
        for (int k = 0; k < K; ++k) mass += s.mass[k * groups + group];
        for (int k = 0; k < K; ++k) {
            const int64_t at = k * c + channel;
            const float own = s.mass[k * groups + group], old = std::exp(log_var[at]), difference = s.m[at] - mean[at];
            const float unbiased = s.v[at] * (own / std::max(std::max(own - 1, own / 2), 1e-12f));
            float step = momentum, spread = 0;
            if (!paper && K > 1) {
                step = std::min(momentum * (own / std::max(mass, 1e-12f)) / weight[k], 1.0f);
                spread = step * (1 - step) * difference * difference;
            }
            mean[at] += step * difference;
            var[k] = old + step * (unbiased - old) + spread;
            pooled += var[k] * (weight[k] / all);
        }
        for (int k = 0; k < K; ++k)
            log_var[k * c + channel] = std::log(std::max(shared ? pooled : var[k], TINY));
    }
}

// mixture.expectation_maximisation, in place: weight (K,), mean and var (K, C); points (P, C), least variances (C,).
void fit_mixture(const float* points, float* weight, float* mean, float* var, const float* least, int64_t count,
                 int64_t c, int64_t groups, float eps, float empty, int steps, int threads) {
    const Shape s{count, c, 1, true};
    const Options o{eps, 0, 1, groups, false, false, threads_for(s, threads)};
    const int64_t stride = padded(count), width = c / groups, blocks = (c + W - 1) / W;
    const int64_t chunks = 1 + count / (4 * W);  // no more than these
    float* const planes = shared_buffer.reserve(stride * c + 4 * K * c + K * groups + K + 2 * K * c + K * groups +
                                             groups * chunks * K * (1 + 2 * width));
#pragma omp parallel for schedule(static) num_threads(o.threads)
    for (int64_t b = 0; b < blocks; ++b)
        gather(points, s, b * W, std::min<int64_t>(W, c - b * W), 0, count, planes + b * W * stride, stride);
    fit_planes(planes, stride, count, c, weight, mean, var, least, empty, steps, o, planes + stride * c);
}
}
