// Vectors of floats for softmax_rows.inc: AVX-512, AVX2 with FMA, and plain C++.
//
// Each has N lanes and: load, store, stream (past the caches, aligned), set; max, add, sub, mul; fma(a, b, c) = a * b + c; round,
// to the nearest, ties to even; rest(x, n) = x - n * ln 2 for whole n, exact to float32; scale(m, d) = m * 2^d for whole d <= 0,
// with 2^-127 taken as 0 (AVX-512 goes on a little, into denormal numbers). max(a, b) is b where either is NaN.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define ECLIPTIC_X86 1
#include <immintrin.h>
#else
#define ECLIPTIC_X86 0
#endif

namespace {

constexpr float DROP = -127.0f;
constexpr float LN2_HIGH = 0x1.62E430p-1f, LN2_LOW = -0x1.05C610p-29f;  // ln 2 in two parts, for FMA (Cody and Waite)
constexpr double LN2 = 0x1.62E42FEFA39EFp-1;

struct PlainVector {  // loops that any compiler turns into whatever it has
  static constexpr int N = 8;
  struct V {
    float lane[N];
  };
  template <class F>
  static inline V each(F f) {
    V r;
    for (int i = 0; i < N; i++) r.lane[i] = f(i);
    return r;
  }
  static inline V set(float a) { return each([&](int) { return a; }); }
  static inline V load(const float* p) { return each([&](int i) { return p[i]; }); }
  static inline void store(float* p, V a) { std::memcpy(p, a.lane, sizeof a.lane); }
  static inline void stream(float* p, V a) { store(p, a); }
  static inline V max(V a, V b) { return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }
  static inline V add(V a, V b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
  static inline V sub(V a, V b) { return each([&](int i) { return a.lane[i] - b.lane[i]; }); }
  static inline V mul(V a, V b) { return each([&](int i) { return a.lane[i] * b.lane[i]; }); }
  static inline V fma(V a, V b, V c) { return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; }); }
  static inline V round(V a) { return each([&](int i) { return std::nearbyint(a.lane[i]); }); }
  static inline V rest(V x, V n) {  // without FMA, two parts of ln 2 in float32 are exact only up to n = 512
    return each([&](int i) { return static_cast<float>(x.lane[i] - n.lane[i] * LN2); });
  }
  static inline V scale(V m, V d) {
    return each([&](int i) {
      const float c = d.lane[i] > DROP ? d.lane[i] : DROP;
      const std::uint32_t bits = static_cast<std::uint32_t>(static_cast<std::int32_t>(c) + 127) << 23;
      float power;
      std::memcpy(&power, &bits, sizeof power);
      return m.lane[i] * power;
    });
  }
};

#if ECLIPTIC_X86
#define AVX2 __attribute__((target("avx2,fma"), always_inline)) static inline
struct Avx2Vector {
  static constexpr int N = 8;
  using V = __m256;
  AVX2 V set(float a) { return _mm256_set1_ps(a); }
  AVX2 V load(const float* p) { return _mm256_loadu_ps(p); }
  AVX2 void store(float* p, V a) { _mm256_storeu_ps(p, a); }
  AVX2 void stream(float* p, V a) { _mm256_stream_ps(p, a); }
  AVX2 V max(V a, V b) { return _mm256_max_ps(a, b); }
  AVX2 V add(V a, V b) { return _mm256_add_ps(a, b); }
  AVX2 V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  AVX2 V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  AVX2 V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  AVX2 V rest(V x, V n) {
    return _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_LOW), _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_HIGH), x));
  }
  AVX2 V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  AVX2 V scale(V m, V d) {  // adding 1.5 * 2^23 + 127 leaves d + 127 in the lowest bits; shifted, that is the exponent
    const V c = _mm256_add_ps(_mm256_max_ps(d, _mm256_set1_ps(DROP)), _mm256_set1_ps(0x1.8000FEp23f));
    return _mm256_mul_ps(m, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(c), 23)));
  }
};

#define AVX512 __attribute__((target("avx512f"), always_inline)) static inline
struct Avx512Vector {
  static constexpr int N = 16;
  using V = __m512;
  AVX512 V set(float a) { return _mm512_set1_ps(a); }
  AVX512 V load(const float* p) { return _mm512_loadu_ps(p); }
  AVX512 void store(float* p, V a) { _mm512_storeu_ps(p, a); }
  AVX512 void stream(float* p, V a) { _mm512_stream_ps(p, a); }
  AVX512 V max(V a, V b) { return _mm512_max_ps(a, b); }
  AVX512 V add(V a, V b) { return _mm512_add_ps(a, b); }
  AVX512 V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  AVX512 V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  AVX512 V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  AVX512 V rest(V x, V n) {
    return _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_LOW), _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_HIGH), x));
  }
  AVX512 V round(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  AVX512 V scale(V m, V d) { return _mm512_scalef_ps(m, d); }
};
#endif

}  // namespace
