// The kernels for a CPU: blocked products, exact top-k as they are made, sums by
// latent in a fixed order, an optimiser step in place. `native.py` builds this file for the machine
// it runs on and says what each function means.
//
// Dimension key: N rows, D width, M latents, K active latents a row.

#include <algorithm>
#include <atomic>
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
constexpr int64_t kChunk = 12 * kBlock;    // rows that one packed panel serves

inline Vec load(const float* at) { return *reinterpret_cast<const Loose*>(at); }
inline void store(float* at, Vec v) { *reinterpret_cast<Loose*>(at) = v; }
inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
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

// Rows of `width` words in slivers of kRows, one depth after the other, padded
// with zeros. A word is a float, or two bfloat16 that stand side by side in D.
void pack_rows(const float* x, int64_t rows, int64_t width, float* out) {
  for (int64_t from = 0; from < width; from += kDepth) {
    int64_t depth = std::min(kDepth, width - from);
    for (int64_t row = 0; row < rows; row += kRows) {
      for (int64_t d = 0; d < depth; ++d) {
        for (int r = 0; r < kRows; ++r) {
          bool inside = row + r < rows;
          *out++ = inside ? x[(row + r) * width + from + d] : 0.f;
        }
      }
    }
  }
}

// Likewise in slivers of kWide latents.
void pack_latents(const float* w, int64_t latents, int64_t width, float* out) {
  for (int64_t from = 0; from < width; from += kDepth) {
    int64_t depth = std::min(kDepth, width - from);
    for (int64_t m = 0; m < latents; m += kWide) {
      for (int64_t j = 0; j < kWide; ++j) {
        const float* in = w + (m + j) * width + from;
        bool inside = m + j < latents;
        for (int64_t d = 0; d < depth; ++d) {
          out[d * kWide + j] = inside ? in[d] : 0.f;
        }
      }
      out += depth * kWide;
    }
  }
}

// sum + x * w, word by word: x is one word, w a vector of them.
struct Full {
  static Vec add(Vec total, const float* x, const float* w) {
    return total + *x * load(w);
  }
};

#ifdef __AVX512BF16__
struct Half {
  static Vec add(Vec total, const float* x, const float* w) {
    __m512i one = _mm512_castps_si512(_mm512_set1_ps(*x));
    __m512i wide = _mm512_loadu_si512(w);
    return (Vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)one, (__m512bh)wide);
  }
};
#endif

// tile[kRows, kPanel] += rows sliver times latents sliver.
template <class Product>
inline void micro(const float* x, const float* w, int64_t depth, float* tile) {
  Vec acc[kRows][kCols];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCols; ++c) {
      acc[r][c] = load(tile + r * kPanel + c * kLanes);
    }
  }
  for (int64_t d = 0; d < depth; ++d) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kCols; ++c) {
        acc[r][c] = Product::add(acc[r][c], x + d * kRows + r,
                                 w + d * kWide + c * kLanes);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCols; ++c) {
      store(tile + r * kPanel + c * kLanes, acc[r][c]);
    }
  }
}

// Bit i of the result says whether at[i] > least, or is no number.
inline uint32_t above(const float* at, float least) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(at), _mm512_set1_ps(least),
                            _CMP_NLE_UQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(
      _mm256_loadu_ps(at), _mm256_set1_ps(least), _CMP_NLE_UQ));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(!(at[i] <= least)) << i;
  return bits;
#endif
}

// A value that is not negative, and its index, as one number that orders as
// top-k does: by value, NaN above all, then by the lower index.
inline uint64_t key(float value, int64_t index) {
  uint32_t high;
  std::memcpy(&high, &value, 4);
  if (std::isnan(value)) high = 0x7FC00000;
  return uint64_t(high) << 32 | ~uint32_t(index);
}
inline float value_of(uint64_t key) {
  uint32_t high = uint32_t(key >> 32);
  float value;
  std::memcpy(&value, &high, 4);
  return value;
}
inline int32_t index_of(uint64_t key) { return int32_t(~uint32_t(key)); }

// Writes the best k of these keys, all of positive values, best first. If they
// are fewer, zeros of the lowest other indices follow.
void write(std::vector<uint64_t>& keys, int64_t k, float* values,
           int32_t* indices) {
  int64_t count = std::min<int64_t>(k, keys.size());
  if (int64_t(keys.size()) > k) {
    std::nth_element(keys.begin(), keys.begin() + k - 1, keys.end(),
                     std::greater<uint64_t>());
  }
  std::sort(keys.begin(), keys.begin() + count, std::greater<uint64_t>());
  for (int64_t i = 0; i < count; ++i) {
    values[i] = value_of(keys[i]);
    indices[i] = index_of(keys[i]);
  }
  if (count == k) return;
  std::vector<int32_t> taken(indices, indices + count);
  std::sort(taken.begin(), taken.end());
  auto skip = taken.begin();
  for (int32_t i = 0; count < k; ++i) {
    if (skip != taken.end() && *skip == i) {
      ++skip;
      continue;
    }
    values[count] = 0.f;
    indices[count++] = i;
  }
}

// Calls take(i, at[i]) where at[i] > least or NaN, for 0 <= i < count.
template <class Take>
inline void each_above(const float* at, int64_t count, float least,
                       Take take) {
  for (int64_t i = 0; i < count; i += kLanes) {
    uint32_t bits = above(at + i, least);
    if (count - i < kLanes) bits &= (1u << (count - i)) - 1;
    for (; bits; bits &= bits - 1) {
      int64_t j = i + __builtin_ctz(bits);
      take(j, at[j]);
    }
  }
}

// What a row keeps while its pre-activations are made, true to float32.
class Best {
 public:
  explicit Best(int64_t k) : k_(k) { keys_.reserve(2 * k + kPanel); }

  // Latents come in ascending order, so one that only equals the k-th best
  // loses to those that are kept.
  void offer(const float* values, int64_t count, int64_t first) {
    each_above(values, count, least_, [&](int64_t i, float value) {
      keys_.push_back(key(value, first + i));
    });
    if (int64_t(keys_.size()) < 2 * k_) return;
    std::nth_element(keys_.begin(), keys_.begin() + k_ - 1, keys_.end(),
                     std::greater<uint64_t>());
    keys_.resize(k_);
    least_ = value_of(keys_.back());
    if (std::isnan(least_)) least_ = INFINITY;  // all others lose
  }

  void finish(float* values, int32_t* indices) {
    write(keys_, k_, values, indices);
  }

 private:
  int64_t k_;
  float least_ = 0.f;
  std::vector<uint64_t> keys_;
};

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

#ifdef __AVX512BF16__
// How far rows of bfloat16 are from what they stand for.
struct Rounded {
  float norm = 0.f;   // of what stands for the row
  float slip = 0.f;   // norm of what rounding took away
};

// Rows of x - centre as bfloat16, two side by side in a word, an odd one at the
// end beside a zero. centre may be null.
void round_rows(const float* x, const float* centre, int64_t rows,
                int64_t width, float* out, Rounded* found) {
  int64_t wide = (width + 1) / 2;
  for (int64_t r = 0; r < rows; ++r) {
    __m512 norms = _mm512_setzero_ps(), slips = _mm512_setzero_ps();
    for (int64_t d = 0; d < width; d += kLanes) {
      int64_t some = std::min<int64_t>(kLanes, width - d);
      __mmask16 in = _cvtu32_mask16((1u << some) - 1);
      __mmask8 pairs = _cvtu32_mask8((1u << ((some + 1) / 2)) - 1);
      __m512 v = _mm512_maskz_loadu_ps(in, x + r * width + d);
      if (centre) v = _mm512_sub_ps(v, _mm512_maskz_loadu_ps(in, centre + d));
      __m256i half = (__m256i)_mm512_cvtneps_pbh(v);
      _mm256_mask_storeu_epi32(out + r * wide + d / 2, pairs, half);
      __m512 back = _mm512_castsi512_ps(
          _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      norms = _mm512_fmadd_ps(back, back, norms);
      __m512 slip = _mm512_sub_ps(v, back);
      slips = _mm512_fmadd_ps(slip, slip, slips);
    }
    found[r].norm = std::sqrt(_mm512_reduce_add_ps(norms));
    found[r].slip = std::sqrt(_mm512_reduce_add_ps(slips));
  }
}

// What a row keeps while its pre-activations are made from bfloat16 factors.
//
// Let c be any centre, x' and w' the bfloat16 that stand for x - c and w, and
// b' = b + <c, w>. By Cauchy-Schwarz, <x, w> + b differs from <x', w'> + b' by
//   |x - c - x'| |w| + |x'| |w - w'|
// at most. Sums of D terms in float32 are off by D 2^-24 of the sum of their
// sizes: <x', w'> + b', b' itself and <x, w> + b together by no more than
//   D 2^-23 ((|x - c| + |c|) |w| + |b|).
// What is not within both of the k-th largest lower bound cannot be among the k
// best; all else is computed again in float32.
class Screened {
 public:
  Screened(int64_t k, const Rounded& x, float centre, int64_t width)
      : k_(k),
        x_(x),
        sum_(1.05f * float(width + 4) * 0x1p-23f),
        size_(x.norm + x.slip + centre) {
    kept_.reserve(2 * k + kPanel);
  }

  // w and bias: the largest of these latents.
  void offer(const float* values, int64_t count, int64_t first,
             const Rounded& w, float bias) {
    float norm = w.norm + w.slip;
    float off = 1.02f * (x_.slip * norm + x_.norm * w.slip) +
                sum_ * (size_ * norm + bias);
    float least = least_ - off;
    each_above(values, count, least, [&](int64_t i, float value) {
      if (value + off <= 0.f) return;
      kept_.push_back({key(std::max(value - off, 0.f), first + i), value + off});
    });
    if (int64_t(kept_.size()) < full_) return;
    std::nth_element(kept_.begin(), kept_.begin() + k_ - 1, kept_.end(),
                     [](const Kept& a, const Kept& b) { return a.low > b.low; });
    least_ = value_of(kept_[k_ - 1].low);
    auto lost = [this](const Kept& one) { return one.high < least_; };
    kept_.erase(std::remove_if(kept_.begin(), kept_.end(), lost), kept_.end());
    full_ = std::max<int64_t>(2 * k_, kept_.size() + kept_.size() / 2);
  }

  void finish(const float* x, const float* w, const float* b, int64_t width,
              float* values, int32_t* indices) {
    full_ = 0;
    if (int64_t(kept_.size()) > k_) offer(nullptr, 0, 0, {}, 0.f);
    std::vector<uint64_t> keys;
    keys.reserve(kept_.size());
    for (const Kept& one : kept_) {
      int64_t m = index_of(one.low);
      float value = dot(x, w + m * width, width) + b[m];
      if (!(value <= 0.f)) keys.push_back(key(value, m));
    }
    write(keys, k_, values, indices);
  }

 private:
  struct Kept {
    uint64_t low;  // key of what it is at least
    float high;    // what it is at most
  };
  int64_t k_, full_ = 2 * k_;
  Rounded x_;
  float sum_, size_, least_ = 0.f;
  std::vector<Kept> kept_;
};
#endif

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using OutF32 = ffi::ResultBuffer<ffi::F32>;
using OutS32 = ffi::ResultBuffer<ffi::S32>;

// Calls take(row, z) with the pre-activations z of each of `count` packed rows
// for `some` packed latents, of `wide` words each; `tile` is room for them.
template <class Product, class Take>
void products(const float* rows, const float* latents, const float* bias,
              int64_t count, int64_t some, int64_t wide,
              std::vector<float>& tile, Take take) {
  for (int64_t r = 0; r < count; r += kBlock) {
    int64_t block = std::min(kBlock, count - r);
    for (int64_t i = 0; i < up(block, kRows); ++i) {
      std::memcpy(&tile[i * kPanel], bias, some * sizeof(float));
    }
    const float *x = rows + r * wide, *w = latents;
    for (int64_t from = 0; from < wide; from += kDepth) {
      int64_t depth = std::min(kDepth, wide - from);
      for (int64_t j = 0; j < some; j += kWide) {
        for (int64_t i = 0; i < block; i += kRows) {
          micro<Product>(x + i * depth, w + j * depth, depth,
                         &tile[i * kPanel + j]);
        }
      }
      x += up(block, kRows) * depth;
      w += up(some, kWide) * depth;
    }
    for (int64_t i = 0; i < block; ++i) take(r + i, &tile[i * kPanel]);
  }
}

// The k best latents of `count` rows, all in float32.
void encode_full(const float* x, const float* w, const float* b, int64_t count,
                 int64_t latents, int64_t width, int64_t k, float* values,
                 int32_t* indices) {
  std::vector<float> own(up(count, kRows) * width);
  std::vector<float> panel(kPanel * width), tile(kBlock * kPanel);
  std::vector<Best> kept;
  for (int64_t r = 0; r < count; ++r) kept.emplace_back(k);
  for (int64_t r = 0; r < count; r += kBlock) {
    pack_rows(x + r * width, std::min(kBlock, count - r), width,
              &own[r * width]);
  }
  for (int64_t m = 0; m < latents; m += kPanel) {
    int64_t some = std::min(kPanel, latents - m);
    pack_latents(w + m * width, some, width, panel.data());
    products<Full>(own.data(), panel.data(), b + m, count, some, width, tile,
                   [&](int64_t r, float* z) { kept[r].offer(z, some, m); });
  }
  for (int64_t r = 0; r < count; ++r) {
    kept[r].finish(values + r * k, indices + r * k);
  }
}

#ifdef __AVX512BF16__
bool finite(const Rounded& one) { return std::isfinite(one.norm + one.slip); }

// The same, what cannot win sorted out in bfloat16. False where something is not
// finite, or so large that no bound is: the rows share a centre, so that one of
// them would take the others with it.
bool encode_screened(const float* x, const float* w, const float* b,
                     int64_t count, int64_t latents, int64_t width, int64_t k,
                     float* values, int32_t* indices) {
  int64_t wide = (width + 1) / 2;
  std::vector<float> own(up(count, kRows) * wide), room(kPanel * wide);
  std::vector<float> panel(kPanel * wide), tile(kBlock * kPanel);
  std::vector<float> centre(width), bias(kPanel);
  std::vector<Rounded> of(kPanel);
  std::vector<Screened> kept;
  // Residual streams share a large mean: rows about it round to less error.
  for (int64_t r = 0; r < count; ++r) {
    axpy(1.f / float(count), x + r * width, width, centre.data());
  }
  float far = std::sqrt(dot(centre.data(), centre.data(), width));
  for (int64_t r = 0; r < count; r += kBlock) {
    int64_t block = std::min(kBlock, count - r);
    round_rows(x + r * width, centre.data(), block, width, room.data(),
               of.data());
    for (int64_t i = 0; i < block; ++i) {
      if (!finite(of[i])) return false;
      kept.emplace_back(k, of[i], far, width);
    }
    pack_rows(room.data(), block, wide, &own[r * wide]);
  }
  for (int64_t m = 0; m < latents; m += kPanel) {
    int64_t some = std::min(kPanel, latents - m);
    round_rows(w + m * width, nullptr, some, width, room.data(), of.data());
    pack_latents(room.data(), some, wide, panel.data());
    Rounded most;
    float most_bias = 0.f;
    for (int64_t j = 0; j < some; ++j) {
      bias[j] = b[m + j] + dot(centre.data(), w + (m + j) * width, width);
      if (std::isnan(bias[j]) || !finite(of[j])) return false;
      most.norm = std::max(most.norm, of[j].norm);
      most.slip = std::max(most.slip, of[j].slip);
      if (std::isfinite(b[m + j])) {
        most_bias = std::max(most_bias, std::abs(b[m + j]));
      }
    }
    products<Half>(own.data(), panel.data(), bias.data(), count, some, wide,
                   tile, [&](int64_t r, float* z) {
                     kept[r].offer(z, some, m, most, most_bias);
                   });
  }
  for (int64_t r = 0; r < count; ++r) {
    kept[r].finish(x + r * width, w, b, width, values + r * k, indices + r * k);
  }
  return true;
}
#endif

ffi::Error encode(ffi::ThreadPool pool, F32 x, F32 w, F32 b, OutF32 vals,
                  OutS32 idx, bool screen) {
  int64_t rows = x.dimensions()[0], width = x.dimensions()[1];
  int64_t latents = w.dimensions()[0], k = vals->dimensions()[1];
  const float *xs = x.typed_data(), *ws = w.typed_data(), *bs = b.typed_data();
  float* values = vals->typed_data();
  int32_t* indices = idx->typed_data();
  int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  int64_t chunk = std::min(kChunk, up((rows + threads - 1) / threads, kBlock));
#ifndef __AVX512BF16__
  if (screen) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      "this processor has no AVX512_BF16");
  }
#endif
  parallel(pool, (rows + chunk - 1) / chunk, [=](int64_t c) {
    int64_t n = c * chunk, count = std::min(chunk, rows - n);
    const float* own = xs + n * width;
    float* vals = values + n * k;
    int32_t* idx = indices + n * k;
#ifdef __AVX512BF16__
    if (screen &&
        encode_screened(own, ws, bs, count, latents, width, k, vals, idx)) {
      return;
    }
#endif
    encode_full(own, ws, bs, count, latents, width, k, vals, idx);
  });
  return ffi::Error::Success();
}

constexpr int64_t kTask = 64;  // rows of a task of the sparse products

// Calls work(n) for every row, kTask rows a task.
void by_rows(ffi::ThreadPool& pool, int64_t rows,
             std::function<void(int64_t)> work) {
  parallel(pool, (rows + kTask - 1) / kTask, [=](int64_t task) {
    int64_t end = std::min(rows, (task + 1) * kTask);
    for (int64_t n = task * kTask; n < end; ++n) work(n);
  });
}

ffi::Error outside() {
  return ffi::Error::InvalidArgument("an index is not in [0, M)");
}

bool inside(const int32_t* at, int64_t count, int64_t latents) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, uint32_t(at[i]));
  return count == 0 || most < uint64_t(latents);
}

ffi::Error spmm(ffi::ThreadPool pool, F32 v, S32 idx, F32 w, OutF32 y) {
  int64_t rows = idx.dimensions()[0], k = idx.dimensions()[1];
  int64_t latents = w.dimensions()[0], width = w.dimensions()[1];
  const float *vs = v.typed_data(), *ws = w.typed_data();
  const int32_t* at = idx.typed_data();
  float* out = y->typed_data();
  if (!inside(at, rows * k, latents)) return outside();
  by_rows(pool, rows, [=](int64_t n) {
    float* mine = out + n * width;
    std::memset(mine, 0, width * sizeof(float));
    for (int64_t j = n * k; j < (n + 1) * k; ++j) {
      if (vs[j] != 0.f) axpy(vs[j], ws + at[j] * width, width, mine);
    }
  });
  return ffi::Error::Success();
}

ffi::Error sddmm(ffi::ThreadPool pool, F32 x, S32 idx, F32 w, OutF32 v) {
  int64_t rows = idx.dimensions()[0], k = idx.dimensions()[1];
  int64_t latents = w.dimensions()[0], width = w.dimensions()[1];
  const float *xs = x.typed_data(), *ws = w.typed_data();
  const int32_t* at = idx.typed_data();
  float* out = v->typed_data();
  if (!inside(at, rows * k, latents)) return outside();
  by_rows(pool, rows, [=](int64_t n) {
    for (int64_t j = n * k; j < (n + 1) * k; ++j) {
      out[j] = dot(xs + n * width, ws + at[j] * width, width);
    }
  });
  return ffi::Error::Success();
}

// The places of every latent, in the order of the rows: those of latent m stand
// in place[first[m]] to place[first[m + 1]].
struct Places {
  std::vector<int64_t> first;
  std::vector<int32_t> place;

  Places(const int32_t* at, int64_t count, int64_t latents)
      : first(latents + 1), place(count) {
    for (int64_t i = 0; i < count; ++i) ++first[at[i] + 1];
    for (int64_t m = 0; m < latents; ++m) first[m + 1] += first[m];
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t i = 0; i < count; ++i) place[next[at[i]]++] = int32_t(i);
  }
};

ffi::Error spmm_t(ffi::ThreadPool pool, F32 v, S32 idx, F32 x, OutF32 w) {
  int64_t rows = idx.dimensions()[0], k = idx.dimensions()[1];
  int64_t latents = w->dimensions()[0], width = w->dimensions()[1];
  const float *vs = v.typed_data(), *xs = x.typed_data();
  float* out = w->typed_data();
  if (!inside(idx.typed_data(), rows * k, latents)) return outside();
  if (rows * k > INT32_MAX) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      "a code of 2^31 entries or more: raise train.accumulate");
  }
  Places places(idx.typed_data(), rows * k, latents);
  const int64_t* first = places.first.data();
  const int32_t* place = places.place.data();
  by_rows(pool, latents, [=](int64_t m) {
    float* mine = out + m * width;
    std::memset(mine, 0, width * sizeof(float));
    for (int64_t j = first[m]; j < first[m + 1]; ++j) {
      int64_t i = place[j];
      if (vs[i] != 0.f) axpy(vs[i], xs + i / k * width, width, mine);
    }
  });
  return ffi::Error::Success();
}

// One step of Adam on rows of parameters and moments, in place. `scalars` are
// the factor of the gradient, the learning rate, the corrections of both moments
// for their start at 0, and whether to change anything at all.
ffi::Error adam(ffi::ThreadPool pool, F32 grad, F32 scalars, F32 p, F32 m, F32 v,
                OutF32 p_out, OutF32 m_out, OutF32 v_out, float b1, float b2,
                float eps, bool unit) {
  int64_t rows = p.dimensions()[0], width = p.dimensions()[1];
  const float *g = grad.typed_data(), *s = scalars.typed_data();
  const float *ps = p.typed_data(), *ms = m.typed_data(), *vs = v.typed_data();
  float *po = p_out->typed_data(), *mo = m_out->typed_data();
  float* vo = v_out->typed_data();
  float factor = s[0], rate = s[1], fix1 = s[2], fix2 = s[3];
  bool good = s[4] != 0.f;
  by_rows(pool, rows, [=](int64_t n) {
    int64_t at = n * width;
    if (!good) {
      if (po != ps) std::memcpy(po + at, ps + at, width * sizeof(float));
      if (mo != ms) std::memcpy(mo + at, ms + at, width * sizeof(float));
      if (vo != vs) std::memcpy(vo + at, vs + at, width * sizeof(float));
      return;
    }
    for (int64_t d = at; d < at + width; ++d) {
      float x = g[d] * factor;
      float first = (1.f - b1) * x + b1 * ms[d];
      float second = (1.f - b2) * (x * x) + b2 * vs[d];
      mo[d] = first;
      vo[d] = second;
      po[d] = ps[d] - rate * (first / fix1) / (std::sqrt(second / fix2) + eps);
    }
    if (!unit) return;
    float norm = std::max(std::sqrt(dot(po + at, po + at, width)), 1e-12f);
    for (int64_t d = at; d < at + width; ++d) po[d] /= norm;
  });
  return ffi::Error::Success();
}

// What is left of a gradient once its part along each row of w is taken out, and
// the sum of its squares.
ffi::Error project(ffi::ThreadPool pool, F32 grad, F32 w, OutF32 out,
                   OutF32 squares) {
  int64_t rows = w.dimensions()[0], width = w.dimensions()[1];
  const float *gs = grad.typed_data(), *ws = w.typed_data();
  float *outs = out->typed_data(), *found = squares->typed_data();
  by_rows(pool, rows, [=](int64_t n) {
    const float *g = gs + n * width, *own = ws + n * width;
    float* mine = outs + n * width;
    float along = dot(g, own, width);
    for (int64_t d = 0; d < width; ++d) mine[d] = g[d] - along * own[d];
    found[n] = dot(mine, mine, width);
  });
  return ffi::Error::Success();
}

}  // namespace

extern "C" bool lmm_sae_screens() {
#ifdef __AVX512BF16__
  return true;
#else
  return false;
#endif
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(LmmSaeEncode, encode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>().Arg<F32>().Arg<F32>()
                                  .Ret<F32>().Ret<S32>()
                                  .Attr<bool>("screen"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(LmmSaeSpmm, spmm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>().Arg<S32>().Arg<F32>()
                                  .Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(LmmSaeSddmm, sddmm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>().Arg<S32>().Arg<F32>()
                                  .Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(LmmSaeSpmmT, spmm_t,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>().Arg<S32>().Arg<F32>()
                                  .Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(LmmSaeAdam, adam,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>().Arg<F32>().Arg<F32>()
                                  .Arg<F32>().Arg<F32>()
                                  .Ret<F32>().Ret<F32>().Ret<F32>()
                                  .Attr<float>("b1").Attr<float>("b2")
                                  .Attr<float>("eps").Attr<bool>("unit"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(LmmSaeProject, project,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>().Arg<F32>()
                                  .Ret<F32>().Ret<F32>());
