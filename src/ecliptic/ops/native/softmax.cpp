// Softmax over rows of float32 in two sweeps, and the two usual forms in three: arXiv 2001.04438.
//
// An exponential is kept as a pair (m, n) that stands for m * 2^n, with m near 1 and n a whole number held in a float. Such pairs do
// not overflow, so no sweep is needed to find the maximum: one adds up the pairs, one writes the quotients. Beyond the caches, time
// goes by what is read and written: 3 values per element instead of 4 (terms computed twice) or 5 (terms stored and read back).
//
// The float exponent is exact up to LIMIT; a row with a larger value, or with none above -LIMIT, falls back to three sweeps. -inf
// counts for nothing, and a row of nothing else gives zeros. NaN, or +inf, makes its whole row NaN.

#include <cstdint>
#include <limits>
#include <vector>

#include "softmax_vectors.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

// Polynomial for exp on [-ln 2 / 2, ln 2 / 2], of degree 5 (the paper's implementation).
constexpr float C1 = 0x1.FFFFF6p-1f, C2 = 0x1.FFFDC6p-2f, C3 = 0x1.555A80p-3f, C4 = 0x1.573A1Ap-5f, C5 = 0x1.0F9F9Cp-7f;
constexpr float LOG2E = 0x1.715476p+0f;
constexpr float LIMIT = 8e6f;  // times log2(e) it stays below 2^24, up to which a float holds every whole number
constexpr float NEAR = 1000.0f;  // what is so far below the maximum has no share
constexpr float NONE = -std::numeric_limits<float>::infinity();
constexpr std::int64_t STREAM_FROM = std::int64_t(8) << 20;  // floats: an output this large does not stay in a cache; ours
constexpr std::int64_t BLOCK = std::int64_t(1) << 14;  // floats added up in float32; ours
constexpr std::int64_t SHARE = std::int64_t(1) << 15;  // floats that are worth a thread; ours

struct Pair {
  double m;  // float while summing a block, double where blocks are added up
  float n;  // m * 2^n; (0, -inf) is zero
};

struct Sum {
  Pair pair = {0.0, NONE};
  float most = NONE;
};

inline Pair added(Pair a, Pair b) {
  if (a.n == NONE && a.m == 0.0) return b;
  const float e = a.n > b.n ? a.n : b.n;
  if (e == NONE) return {a.m + b.m, NONE};
  const auto moved = [e](Pair p) { return p.n - e <= DROP ? p.m * 0.0 : std::ldexp(p.m, static_cast<int>(p.n - e)); };
  return {moved(a) + moved(b), e};  // times 0, not 0: a NaN is to stay
}

inline Sum merged(Sum a, Sum b) { return {added(a.pair, b.pair), a.most > b.most ? a.most : b.most}; }

struct Sweeps {
  Sum (*sum)(const float*, std::int64_t);
  void (*divide)(const float*, float*, std::int64_t, Pair, bool);
  float (*largest)(const float*, std::int64_t);
  float (*shifted_sum)(const float*, float*, std::int64_t, float);
  void (*shifted_divide)(const float*, float*, std::int64_t, float, float, bool);
  void (*rescale)(float*, std::int64_t, float);
};

#define INLINE static inline __attribute__((always_inline))
namespace plain {
#define T PlainVector
#define TARGET
#include "softmax_rows.inc"
#undef TARGET
#undef T
}  // namespace plain
#if ECLIPTIC_X86
namespace avx2 {
#define T Avx2Vector
#define TARGET __attribute__((target("avx2,fma")))
#include "softmax_rows.inc"
#undef TARGET
#undef T
}  // namespace avx2
namespace avx512 {
#define T Avx512Vector
#define TARGET __attribute__((target("avx512f")))
#include "softmax_rows.inc"
#undef TARGET
#undef T
}  // namespace avx512
#endif

enum Backend { PLAIN = 1, AVX2_FMA = 2, AVX512_F = 4 };
enum Algorithm { TWO_PASS = 0, RECOMPUTE = 1, RELOAD = 2 };

int available() {
  int found = PLAIN;
#if ECLIPTIC_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found |= AVX2_FMA;
  if (__builtin_cpu_supports("avx512f")) found |= AVX512_F;
#endif
  return found;
}

const Sweeps& sweeps(int backend) {
  const int usable = available() & (backend ? backend : ~0);
#if ECLIPTIC_X86
  if (usable & AVX512_F) return avx512::SWEEPS;
  if (usable & AVX2_FMA) return avx2::SWEEPS;
#endif
  (void)usable;
  return plain::SWEEPS;
}

// A row cut into parts, one a thread; `each(start, count, part)` is called for all of them.
template <class F>
void parts(std::int64_t columns, int threads, F each) {
  if (threads == 1) return each(0, columns, 0);
  const std::int64_t step = ((columns + threads - 1) / threads + 63) / 64 * 64;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int part = 0; part < threads; part++) {
    const std::int64_t start = part * step, left = columns - start;
    if (left > 0) each(start, left < step ? left : step, part);
  }
}

// The same in blocks, whose results are merged; short enough blocks for float sums to lose nothing.
template <class R, class F, class M>
R folded(std::int64_t columns, int threads, R first, F each, M merge) {
  const auto blocks = [&](std::int64_t start, std::int64_t count) {
    R all = first;
    for (std::int64_t at = start; at < start + count; at += BLOCK) {
      const std::int64_t left = start + count - at;
      all = merge(all, each(at, left < BLOCK ? left : BLOCK));
    }
    return all;
  };
  if (threads == 1) return blocks(0, columns);
  std::vector<R> found(threads, first);
  parts(columns, threads, [&](std::int64_t start, std::int64_t count, int part) { found[part] = blocks(start, count); });
  R all = first;
  for (const R& one : found) all = merge(all, one);
  return all;
}

Sum row_sum(const Sweeps& s, const float* x, std::int64_t columns, int threads) {
  return folded(columns, threads, Sum(), [&](std::int64_t at, std::int64_t n) { return s.sum(x + at, n); }, merged);
}

bool exact(const Sum& sum) {  // false for NaN, too
  return sum.pair.m == sum.pair.m && sum.most <= LIMIT && sum.most > NEAR - LIMIT;
}

void three_sweeps(const Sweeps& s, const float* x, float* y, std::int64_t columns, int threads, bool reload, bool streaming) {
  const auto larger = [](float a, float b) { return a > b ? a : b; };
  const float most =
      folded(columns, threads, NONE, [&](std::int64_t at, std::int64_t n) { return s.largest(x + at, n); }, larger);
  if (most == NONE) {  // nothing but -inf and NaN
    float all = 0.0f;
    for (std::int64_t i = 0; i < columns; i++) all = x[i] == NONE ? all : x[i];
    for (std::int64_t i = 0; i < columns; i++) y[i] = all;
    return;
  }
  const auto plus = [](double a, double b) { return a + b; };
  const double sum = folded(
      columns, threads, 0.0,
      [&](std::int64_t at, std::int64_t n) { return double(s.shifted_sum(x + at, reload ? y + at : nullptr, n, most)); }, plus);
  parts(columns, threads, [&](std::int64_t at, std::int64_t n, int) {
    if (reload)
      s.rescale(y + at, n, float(1.0 / sum));
    else
      s.shifted_divide(x + at, y + at, n, most, float(sum), streaming);
  });
}

void row(const Sweeps& s, const float* x, float* y, std::int64_t columns, int threads, int algorithm, bool streaming) {
  if (algorithm != TWO_PASS) return three_sweeps(s, x, y, columns, threads, algorithm == RELOAD, streaming);
  const Sum all = row_sum(s, x, columns, threads);
  if (!exact(all)) return three_sweeps(s, x, y, columns, threads, false, streaming);
  parts(columns, threads,
        [&](std::int64_t at, std::int64_t n, int) { s.divide(x + at, y + at, n, all.pair, streaming); });
}

// Few long rows share their sweeps among the threads; many rows share the rows.
template <class F>
void over_rows(std::int64_t rows, std::int64_t columns, int threads, F each) {
  const std::int64_t worth = (rows * columns + SHARE - 1) / SHARE;
  if (threads > worth) threads = worth > 1 ? int(worth) : 1;
  if (rows < threads) {
    for (std::int64_t r = 0; r < rows; r++) each(r, threads);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (std::int64_t r = 0; r < rows; r++) each(r, 1);
}

}  // namespace

extern "C" {

int ecliptic_softmax_version() { return 1; }

// Bits: 1 plain C++, 2 AVX2 with FMA, 4 AVX-512. In what follows, `backend` is one of them, or 0 for the best.
int ecliptic_softmax_backends() { return available(); }

// y (rows, columns), contiguous, = softmax of each row of x, whose rows begin `stride` floats apart. x and y do not overlap.
void ecliptic_softmax(const float* x, float* y, std::int64_t rows, std::int64_t columns, std::int64_t stride, int algorithm,
                      int threads, int backend) {
  const Sweeps& s = sweeps(backend);
  const bool streaming = rows * columns >= STREAM_FROM;
  over_rows(rows, columns, threads, [&](std::int64_t r, int each) {
    row(s, x + r * stride, y + r * columns, columns, each, algorithm, streaming);
  });
}

// (m, n) of each row: its sum of exponentials is m * 2^n. exact[r] is 0 where a value lies beyond what pairs can hold.
void ecliptic_exp_sum(const float* x, float* m, float* n, unsigned char* within, std::int64_t rows, std::int64_t columns,
                      std::int64_t stride, int threads, int backend) {
  const Sweeps& s = sweeps(backend);
  over_rows(rows, columns, threads, [&](std::int64_t r, int each) {
    const Sum all = row_sum(s, x + r * stride, columns, each);
    m[r] = float(all.pair.m);
    n[r] = all.pair.n;
    within[r] = exact(all);
  });
}
}
