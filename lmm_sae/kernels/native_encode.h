// Blocked products whose k best are kept as they are made.

#ifndef LMM_SAE_NATIVE_ENCODE_H_
#define LMM_SAE_NATIVE_ENCODE_H_

#include "native_base.h"
#include "native_topk.h"

namespace {

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

// How far a product of bfloat16 can be from the pre-activation it stands for.
//
// Let c be any centre, x' and w' the bfloat16 that stand for x - c and w, and
// b' = b + <c, w>. By Cauchy-Schwarz, <x, w> + b differs from <x', w'> + b' by
//   |x - c - x'| |w| + |x'| |w - w'|
// at most. Sums of D terms in float32 are off by D 2^-24 of the sum of their
// sizes: <x', w'> + b', b' itself and <x, w> + b together by no more than
//   D 2^-23 ((|x - c| + |c|) |w| + |b|).
class Screen {
 public:
  Screen(const Rounded& x, float centre, int64_t width)
      : x_(x),
        sum_(1.05f * float(width + 4) * 0x1p-23f),
        size_(x.norm + x.slip + centre) {}

  // w and bias: the largest of some latents.
  float off(const Rounded& w, float bias) const {
    float norm = w.norm + w.slip;
    return 1.02f * (x_.slip * norm + x_.norm * w.slip) +
           sum_ * (size_ * norm + bias);
  }

 private:
  Rounded x_;
  float sum_, size_;
};
#endif

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
  std::vector<Kept<false>> kept(count, Kept<false>(k));
  for (int64_t r = 0; r < count; r += kBlock) {
    pack_rows(x + r * width, std::min(kBlock, count - r), width,
              &own[r * width]);
  }
  for (int64_t m = 0; m < latents; m += kPanel) {
    int64_t some = std::min(kPanel, latents - m);
    pack_latents(w + m * width, some, width, panel.data());
    products<Full>(own.data(), panel.data(), b + m, count, some, width, tile,
                   [&](int64_t r, float* z) { kept[r].offer(z, some, m, 0.f); });
  }
  std::vector<uint64_t> keys;
  for (int64_t r = 0; r < count; ++r) {
    keys.clear();
    for (int64_t i = 0; i < kept[r].count(); ++i) {
      keys.push_back(key(kept[r].low(i), kept[r].index(i)));
    }
    write(keys, k, values + r * k, indices + r * k);
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
  std::vector<Kept<true>> kept(count, Kept<true>(k));
  std::vector<Screen> screen;
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
      screen.emplace_back(of[i], far, width);
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
                     kept[r].offer(z, some, m, screen[r].off(most, most_bias));
                   });
  }
  std::vector<uint64_t> keys;
  for (int64_t r = 0; r < count; ++r) {
    kept[r].shrink(0);
    keys.clear();
    for (int64_t i = 0; i < kept[r].count(); ++i) {
      int64_t j = kept[r].index(i);
      float value = dot(x + r * width, w + j * width, width) + b[j];
      if (!(value <= 0.f)) keys.push_back(key(value, j));
    }
    write(keys, k, values + r * k, indices + r * k);
  }
  return true;
}
#endif

}  // namespace

#endif  // LMM_SAE_NATIVE_ENCODE_H_
