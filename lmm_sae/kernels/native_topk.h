// Exact top-k of a row whose pre-activations are made a few latents at a time.

#ifndef LMM_SAE_NATIVE_TOPK_H_
#define LMM_SAE_NATIVE_TOPK_H_

#include "native_base.h"

namespace {

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

// What a row keeps while its pre-activations are made, latents in ascending order:
// all that may be among its k best. A value is known to within `off` only, which
// is 0 where kScreened is false.
//
// k of those kept are at least `least_`, whatever `off` was. A later latent that
// can only equal it loses to them, which have lower indices.
template <bool kScreened>
class Kept {
 public:
  explicit Kept(int64_t k) : k_(k), full_(k + std::max<int64_t>(k, kLanes)) {
    grow();
  }

  // Takes what may win of values[0] to values[count - 1], those of the latents
  // from `first` on. A whole vector of values is read from any start.
  void offer(const float* values, int64_t count, int64_t first, float off) {
    for (int64_t i = 0; i < count; i += kLanes) {
      uint32_t bits = first_bits(above(values + i, least_ - off), count - i);
      if (!bits) continue;
      take(values + i, bits, int32_t(first + i), off);
      if (count_ >= full_) shrink(k_ / 8);
    }
  }

  // Drops what cannot win any more, and whatever is beyond k + spare unless it
  // is tied or not known well enough.
  void shrink(int64_t spare) {
    if (count_ <= k_) return;
    least_ = bound(spare);
    int64_t left = 0;
    for (int64_t i = 0; i < count_; i += kLanes) {
      uint32_t bits = ~below(high() + i, least_) & ((1ull << kLanes) - 1);
      left = move(i, first_bits(bits, count_ - i), left);
    }
    count_ = left;
    if (left + left / 2 > full_) {
      full_ = left + left / 2;
      grow();
    }
  }

  int64_t count() const { return count_; }
  int32_t index(int64_t i) const { return index_[i]; }
  float low(int64_t i) const { return low_[i]; }

 private:
  const float* high() const { return kScreened ? high_.data() : low_.data(); }

  void grow() {
    low_.resize(full_ + 2 * kLanes);
    index_.resize(full_ + 2 * kLanes);
    if (kScreened) high_.resize(full_ + 2 * kLanes);
  }

  void take(const float* values, uint32_t bits, int32_t first, float off) {
#ifdef __AVX512F__
    __mmask16 mask = _cvtu32_mask16(bits);
    __m512 value = _mm512_loadu_ps(values), low = value;
    if (kScreened) {
      __m512 offs = _mm512_set1_ps(off);
      low = _mm512_max_ps(_mm512_sub_ps(value, offs), _mm512_setzero_ps());
      _mm512_storeu_ps(&high_[count_],
                       _mm512_maskz_compress_ps(mask, _mm512_add_ps(value, offs)));
    }
    _mm512_storeu_ps(&low_[count_], _mm512_maskz_compress_ps(mask, low));
    __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
                                      13, 14, 15);
    __m512i all = _mm512_add_epi32(_mm512_set1_epi32(first), lanes);
    _mm512_storeu_si512(&index_[count_], _mm512_maskz_compress_epi32(mask, all));
    count_ += __builtin_popcount(bits);
#else
    for (; bits; bits &= bits - 1) {
      int i = __builtin_ctz(bits);
      low_[count_] = kScreened ? std::max(values[i] - off, 0.f) : values[i];
      if (kScreened) high_[count_] = values[i] + off;
      index_[count_++] = first + i;
    }
#endif
  }

  // Moves the entries of these bits from i on to `to` on; returns their end.
  int64_t move(int64_t i, uint32_t bits, int64_t to) {
#ifdef __AVX512F__
    __mmask16 mask = _cvtu32_mask16(bits);
    auto pack = [&](float* at) {
      __m512 all = _mm512_loadu_ps(at + i);
      _mm512_storeu_ps(at + to, _mm512_maskz_compress_ps(mask, all));
    };
    pack(low_.data());
    if (kScreened) pack(high_.data());
    pack(reinterpret_cast<float*>(index_.data()));
    return to + __builtin_popcount(bits);
#else
    for (; bits; bits &= bits - 1, ++to) {
      int64_t from = i + __builtin_ctz(bits);
      low_[to] = low_[from];
      if (kScreened) high_[to] = high_[from];
      index_[to] = index_[from];
    }
    return to;
#endif
  }

  int64_t at_least(float least) const {
    int64_t found = count_;
    for (int64_t i = 0; i < count_; i += kLanes) {
      found -= __builtin_popcount(
          first_bits(below(low_.data() + i, least), count_ - i));
    }
    return found;
  }

  // A value that k of the lower bounds meet and, where ties allow it, no more
  // than k + spare. Halving values ends, since there are finitely many between.
  float bound(int64_t spare) const {
    float least = least_;
    float most = least;
    for (int64_t i = 0; i < count_; ++i) {
      if (low_[i] > most) most = low_[i];  // NaN, which meets any bound, is not
    }
    most = std::min(most, FLT_MAX);
    if (at_least(most) >= k_) return most;
    while (true) {
      float middle = least + (most - least) / 2;
      if (!(least < middle && middle < most)) return least;
      int64_t found = at_least(middle);
      (found >= k_ ? least : most) = middle;
      if (found >= k_ && found <= k_ + spare) return least;
    }
  }

  int64_t k_, full_, count_ = 0;
  float least_ = 0.f;
  std::vector<float> low_, high_;
  std::vector<int32_t> index_;
};

}  // namespace

#endif  // LMM_SAE_NATIVE_TOPK_H_
