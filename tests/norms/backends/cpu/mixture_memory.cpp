// Run the loops on exactly sized memory and print a number of each case, from all bits that they return.
//
// test_norms_native.py compiles this with a sanitizer, and with LOOPS the loops' file, whose buffers are new each time.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

static float* exactly(std::int64_t n) {
    void* block = nullptr;
    return posix_memalign(&block, 64, 4 * n) ? nullptr : static_cast<float*>(block);
}

#include LOOPS

namespace {

// Memory that begins at a multiple of 4 bytes alone, and ends where it ends.
struct Exact {
    char* block;
    float* data;
    int64_t size;
    explicit Exact(int64_t n) : block(static_cast<char*>(std::malloc(4 * n + 4))), data((float*)(block + 4)), size(n) {}
    Exact(int64_t n, std::mt19937& draws) : Exact(n) {
        std::normal_distribution<float> normal(0.3f, 1.5f);
        for (int64_t i = 0; i < n; ++i) data[i] = normal(draws);
    }
    ~Exact() { std::free(block); }
    Exact(const Exact&) = delete;
};

uint64_t bits(uint64_t hash, float value) {
    uint32_t own;
    std::memcpy(&own, &value, 4);
    return (hash ^ own) * 1099511628211u;
}

}  // namespace

int main() {
    struct Case {
        int64_t n, c, l, groups;
    };
    const Case cases[] = {{1, 2, 1, 1},   {3, 4, 1, 2},   {1, 6, 3, 2},     {2, 17, 9, 1},     {5, 36, 21, 2},
                          {1, 32, 16, 1}, {7, 14, 5, 2},  {2, 10, 320, 2},  {1, 18, 16, 18},   {4, 62, 65, 2},
                          {2, 514, 5, 1}, {3, 7, 900, 7}, {3, 38, 272, 19}, {40, 10, 100, 10}, {1, 1100, 20, 2}};
    for (const Case& s : cases)
        for (int choice = 0; choice < 8; ++choice) {
            const bool learned = choice & 1, wanted = choice & 2, affine = choice & 4;
            std::mt19937 draws(1);
            const int64_t size = s.n * s.c * s.l;
            const Exact x(size, draws), g(size, draws), log(K, draws), mean(K * s.c, draws), weight(2 * s.c, draws);
            Exact var(K * s.c, draws);
            for (int64_t i = 0; i < var.size; ++i) var.data[i] = 0.5f + std::fabs(var.data[i]);
            for (int rows = 0; rows < 2; ++rows) {
                const auto at = [&](int64_t i, int64_t j, int64_t k) {
                    return rows ? (i * s.l + k) * s.c + j : (i * s.c + j) * s.l + k;
                };
                Exact own(size), gradient(size), y(size), dx(size), state(state_size(s.c, s.groups));
                Exact tau(learned ? 0 : posteriors_size(s.n, s.c, s.l, rows, s.groups));
                Exact of_affine(2 * s.c), of_rows(2 * K * s.c), of_log(K * s.c);
                for (int64_t i = 0; i < s.n; ++i)
                    for (int64_t j = 0; j < s.c; ++j)
                        for (int64_t k = 0; k < s.l; ++k) {
                            own.data[at(i, j, k)] = x.data[(i * s.c + j) * s.l + k];
                            gradient.data[at(i, j, k)] = g.data[(i * s.c + j) * s.l + k];
                        }
                const float *const w = affine ? weight.data : nullptr, *const b = affine ? weight.data + s.c : nullptr;
                forward(own.data, y.data, state.data, tau.data, log.data, mean.data, var.data, w, b, s.n, s.c, s.l,
                        rows, s.groups, 1e-5f, -1e30f, 1.0f, 0, learned, 1);
                backward(own.data, gradient.data, dx.data, state.data, tau.data, w, affine ? of_affine.data : nullptr,
                         wanted ? of_rows.data : nullptr, wanted ? of_log.data : nullptr, s.n, s.c, s.l, rows, s.groups,
                         1e-5f, 1.0f, learned, 1);
                uint64_t hash = 1469598103934665603u;
                for (const Exact* t : {&y, &dx})
                    for (int64_t i = 0; i < s.n; ++i)
                        for (int64_t j = 0; j < s.c; ++j)
                            for (int64_t k = 0; k < s.l; ++k) hash = bits(hash, t->data[at(i, j, k)]);
                if (affine)
                    for (int64_t i = 0; i < of_affine.size; ++i) hash = bits(hash, of_affine.data[i]);
                if (wanted)
                    for (const Exact* t : {&of_rows, &of_log})
                        for (int64_t i = 0; i < t->size; ++i) hash = bits(hash, t->data[i]);
                std::printf("%ld %ld %ld %ld %d: %016lx\n", (long)s.n, (long)s.c, (long)s.l, (long)s.groups, choice,
                            (unsigned long)hash);
            }
        }
}
