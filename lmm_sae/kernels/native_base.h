// Vectors, threads and sums that the kernels for a CPU are made of.
//
// Dimension key: N rows, D width, M latents, K active latents a row.

#ifndef LMM_SAE_NATIVE_BASE_H_
#define LMM_SAE_NATIVE_BASE_H_

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// A vector is one register. A micro-tile of the product is kRows rows by kCols
// vectors of latents, as many accumulators as the register file has room for.
#ifdef __AVX512F__
constexpr int kLanes = 16, kRows = 12, kCols = 2;
#else
constexpr int kLanes = 8, kRows = 6, kCols = 2;
#endif
typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef float Loose __attribute__((vector_size(kLanes * 4), aligned(4)));

constexpr int64_t kWide = kLanes * kCols;  // latents of a micro-tile
constexpr int64_t kDepth = 256;            // words of a row at a time: a sliver
                                           // of latents stays in the L1 cache
constexpr int64_t kBlock = 8 * kRows;      // rows of a tile of pre-activations
constexpr int64_t kPanel = 256;            // latents of that tile
constexpr int64_t kChunk = 48 * kBlock;    // rows that one packed panel serves

inline Vec load(const float* at) { return *reinterpret_cast<const Loose*>(at); }
inline void store(float* at, Vec v) { *reinterpret_cast<Loose*>(at) = v; }
inline float sum(Vec v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
#endif
}
inline float root(float v) { return std::sqrt(v); }
inline Vec root(Vec v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}
inline int64_t up(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

// Calls work(i) for 0 <= i < count on the pool's threads and on this one, which
// takes its share instead of waiting for threads that may never be free.
void parallel(ffi::ThreadPool& pool, int64_t count,
              std::function<void(int64_t)> work) {
  struct Shared {
    std::function<void(int64_t)> work;
    int64_t count;
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
    void run() {
      for (int64_t i; (i = next.fetch_add(1)) < count;) {
        work(i);
        if (done.fetch_add(1) + 1 == count) {
          std::lock_guard<std::mutex> lock(mutex);
          finished.notify_all();
        }
      }
    }
  };
  if (count <= 0) return;
  auto shared = std::make_shared<Shared>();
  shared->work = std::move(work);
  shared->count = count;
  int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    pool.Schedule([shared] { shared->run(); });
  }
  shared->run();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->finished.wait(lock, [&] { return shared->done == count; });
}

// Bit i of the result says whether at[i] > least or no number, or at[i] < least.
#if defined(__AVX512F__)
inline uint32_t above(const float* at, float least) {
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(at), _mm512_set1_ps(least),
                            _CMP_NLE_UQ);
}
inline uint32_t below(const float* at, float least) {
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(at), _mm512_set1_ps(least),
                            _CMP_LT_OQ);
}
#elif defined(__AVX2__)
inline uint32_t above(const float* at, float least) {
  return _mm256_movemask_ps(_mm256_cmp_ps(
      _mm256_loadu_ps(at), _mm256_set1_ps(least), _CMP_NLE_UQ));
}
inline uint32_t below(const float* at, float least) {
  return _mm256_movemask_ps(_mm256_cmp_ps(
      _mm256_loadu_ps(at), _mm256_set1_ps(least), _CMP_LT_OQ));
}
#else
inline uint32_t above(const float* at, float least) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(!(at[i] <= least)) << i;
  return bits;
}
inline uint32_t below(const float* at, float least) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(at[i] < least) << i;
  return bits;
}
#endif

// The bits of the first `count` lanes, all of them where they are that many.
inline uint32_t first_bits(uint32_t bits, int64_t count) {
  return count < kLanes ? bits & ((1u << count) - 1) : bits;
}

// y += v * w, of width D.
inline void axpy(float v, const float* w, int64_t width, float* y) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    store(y + d, load(y + d) + v * load(w + d));
  }
  for (; d < width; ++d) y[d] += v * w[d];
}

inline float dot(const float* x, const float* w, int64_t width) {
  Vec acc[4] = {};
  int64_t d = 0;
  for (; d + 4 * kLanes <= width; d += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) {
      acc[i] += load(x + d + i * kLanes) * load(w + d + i * kLanes);
    }
  }
  for (; d + kLanes <= width; d += kLanes) acc[0] += load(x + d) * load(w + d);
  float total = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
  for (; d < width; ++d) total += x[d] * w[d];
  return total;
}

}  // namespace

#endif  // LMM_SAE_NATIVE_BASE_H_
