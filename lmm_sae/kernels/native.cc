// The kernels for a CPU: blocked products, exact top-k as they are made, sums by
// latent in a fixed order, an optimiser step in place. `native.py` builds this file
// for the machine it runs on and says what each function means.

#include "native_base.h"
#include "native_encode.h"

namespace {

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using OutF32 = ffi::ResultBuffer<ffi::F32>;
using OutS32 = ffi::ResultBuffer<ffi::S32>;

constexpr int64_t kTask = 64;  // rows of a task of the sparse products

// Calls work(n) for every row, kTask rows a task.
void by_rows(ffi::ThreadPool& pool, int64_t rows,
             std::function<void(int64_t)> work) {
  parallel(pool, (rows + kTask - 1) / kTask, [=](int64_t task) {
    int64_t end = std::min(rows, (task + 1) * kTask);
    for (int64_t n = task * kTask; n < end; ++n) work(n);
  });
}

// The k best of some latents for some rows.
void best(const float* x, const float* w, const float* b, int64_t rows,
          int64_t latents, int64_t width, int64_t k, bool screen, float* values,
          int32_t* indices) {
#ifdef __AVX512BF16__
  if (screen &&
      encode_screened(x, w, b, rows, latents, width, k, values, indices)) {
    return;
  }
#endif
  encode_full(x, w, b, rows, latents, width, k, values, indices);
}

// Few rows: each thread packs and multiplies a part of the latents, since packing
// all of them would take it longer than the products.
void best_of_parts(ffi::ThreadPool& pool, const float* x, const float* w,
                   const float* b, int64_t rows, int64_t latents, int64_t width,
                   int64_t k, bool screen, int64_t parts, float* values,
                   int32_t* indices) {
  int64_t part = up((latents + parts - 1) / parts, kPanel);
  auto own = [=](int64_t p) {  // how many of its latents part p finds
    return std::clamp<int64_t>(latents - p * part, 0, std::min(k, part));
  };
  std::vector<std::vector<float>> found(parts);
  std::vector<std::vector<int32_t>> at(parts);
  parallel(pool, parts, [&](int64_t p) {
    if (own(p) == 0) return;
    int64_t m = p * part, some = std::min(part, latents - m);
    found[p].resize(rows * own(p));
    at[p].resize(rows * own(p));
    best(x, w + m * width, b + m, rows, some, width, own(p), screen,
         found[p].data(), at[p].data());
  });
  by_rows(pool, rows, [&](int64_t n) {
    std::vector<uint64_t> keys;
    for (int64_t p = 0; p < parts; ++p) {
      for (int64_t j = n * own(p); j < (n + 1) * own(p); ++j) {
        float value = found[p][j];
        if (!(value <= 0.f)) keys.push_back(key(value, at[p][j] + p * part));
      }
    }
    write(keys, k, values + n * k, indices + n * k);
  });
}

constexpr int64_t kFew = 512;  // rows

ffi::Error encode(ffi::ThreadPool pool, F32 x, F32 w, F32 b, OutF32 vals,
                  OutS32 idx, bool screen) {
  int64_t rows = x.dimensions()[0], width = x.dimensions()[1];
  int64_t latents = w.dimensions()[0], k = vals->dimensions()[1];
  const float *xs = x.typed_data(), *ws = w.typed_data(), *bs = b.typed_data();
  float* values = vals->typed_data();
  int32_t* indices = idx->typed_data();
#ifndef __AVX512BF16__
  if (screen) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      "this processor has no AVX512_BF16");
  }
#endif
  int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  int64_t parts = std::min(threads, latents / kPanel);
  if (rows <= kFew && parts > 1) {
    best_of_parts(pool, xs, ws, bs, rows, latents, width, k, screen, parts,
                  values, indices);
    return ffi::Error::Success();
  }
  int64_t chunk = std::min(kChunk, up((rows + threads - 1) / threads, kBlock));
  parallel(pool, (rows + chunk - 1) / chunk, [=](int64_t c) {
    int64_t n = c * chunk, count = std::min(chunk, rows - n);
    best(xs + n * width, ws, bs, count, latents, width, k, screen,
         values + n * k, indices + n * k);
  });
  return ffi::Error::Success();
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

// What a step of Adam multiplies by: the gradient's factor, the decay of both
// moments, the learning rate over the first one's correction for its start at 0,
// the root of the second one's, and what is added to that root.
struct Adam {
  float factor, b1, b2, rate, fix, eps;

  // Of one number or of a vector of them.
  template <class T>
  void step(T g, T& p, T& m, T& v) const {
    g *= factor;
    m = (1.f - b1) * g + b1 * m;
    v = (1.f - b2) * (g * g) + b2 * v;
    p -= rate * m / (root(v) * fix + eps);
  }
};

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
  Adam adam{s[0], b1, b2, s[1] / s[2], 1.f / std::sqrt(s[3]), eps};
  bool good = s[4] != 0.f;
  by_rows(pool, rows, [=](int64_t n) {
    int64_t at = n * width, end = at + width;
    if (!good) {
      if (po != ps) std::memcpy(po + at, ps + at, width * sizeof(float));
      if (mo != ms) std::memcpy(mo + at, ms + at, width * sizeof(float));
      if (vo != vs) std::memcpy(vo + at, vs + at, width * sizeof(float));
      return;
    }
    int64_t d = at;
    for (; d + kLanes <= end; d += kLanes) {
      Vec param = load(ps + d), first = load(ms + d), second = load(vs + d);
      adam.step(load(g + d), param, first, second);
      store(po + d, param);
      store(mo + d, first);
      store(vo + d, second);
    }
    for (; d < end; ++d) {
      float param = ps[d], first = ms[d], second = vs[d];
      adam.step(g[d], param, first, second);
      po[d] = param;
      mo[d] = first;
      vo[d] = second;
    }
    if (!unit) return;
    float norm = std::max(std::sqrt(dot(po + at, po + at, width)), 1e-12f);
    float scale = 1.f / norm;
    for (d = at; d < end; ++d) po[d] *= scale;
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
