// How the families that normalise along one dimension walk along it.
#pragma once

#include <ATen/TensorIterator.h>
#include <c10/util/accumulate.h>

#include "pack.h"

namespace gradnorm_kernels::CPU_CAPABILITY {

// Visits a row whose elements are neighbours.
template <class T>
struct Along {
  int64_t n;

  // Calls of fn(offset, count) by `each`.
  int64_t packs() const {
    return (n + Pack<T>::size - 1) / Pack<T>::size;
  }
  template <class Fn>
  void each(const Fn& fn) const {
    for_each_pack<Pack<T>>(n, fn);
  }
  // In every lane the sum of all, or the largest.
  static Pack<T> total(const Pack<T>& sums) {
    return sums.sum();
  }
  static Pack<T> largest(const Pack<T>& several) {
    return several.max();
  }
  // Of the rows that are visited together: how many there are, how far apart a row's elements lie, and a
  // value of each one's own.
  static constexpr int64_t rows = 1, stride = 1;
  static Pack<T> each_its_own(const typename Pack<T>::Scalar* values) {
    return values[0];
  }
};

// Visits at most as many neighbouring rows as a pack has lanes, whose elements lie `stride` apart.
template <class T>
struct Across {
  int64_t n, stride, rows;

  int64_t packs() const {
    return n;
  }
  template <class Fn>
  void each(const Fn& fn) const {
    for_each_pack<Pack<T>>(rows, [&](int64_t, auto count) {
      for (int64_t i = 0; i < n; ++i) {
        fn(i * stride, count);
      }
    });
  }
  static const Pack<T>& total(const Pack<T>& sums) {
    return sums;
  }
  static const Pack<T>& largest(const Pack<T>& several) {
    return several;
  }
  static Pack<T> each_its_own(const typename Pack<T>::Scalar* values) {
    return Pack<T>::load(values, Pack<T>::size);
  }
};

// Calls fn(pointers to the operands' first elements, Along or Across) for every row along dim, or pack of
// rows, on all of PyTorch's threads. The operands, outputs first, have one shape and contiguous rows, or hold
// one element a row.
template <class T, size_t Operands, class Fn>
void for_each_row(
    const std::array<at::Tensor, Operands>& operands, size_t outputs, int64_t dim, const Fn& fn) {
  const at::Tensor& like = *std::max_element(
      operands.begin(), operands.end(), [](const auto& a, const auto& b) { return a.dim() < b.dim(); });
  if (like.numel() == 0) {
    return;
  }
  const bool scalar = like.dim() == 0;
  const int64_t n = scalar ? 1 : like.size(dim);
  // Not the stride of dim, which says nothing where its size is 1.
  const int64_t inner = scalar ? 1 : c10::multiply_integers(like.sizes().slice(dim + 1));

  // The iterator's elements are the rows, each one by its first element.
  at::TensorIteratorConfig config;
  config.check_all_same_dtype(false);
  std::array<int64_t, Operands> sizes;
  for (size_t k = 0; k < Operands; ++k) {
    sizes[k] = static_cast<int64_t>(operands[k].element_size());
    const bool whole = !scalar && operands[k].dim() == like.dim();
    const at::Tensor first = whole ? operands[k].select(dim, 0) : operands[k];
    k < outputs ? config.add_owned_output(first) : config.add_owned_const_input(first);
  }
  auto iter = config.build();
  const auto loop = [&](char** data, const int64_t* strides, int64_t count) {
    const auto rows_from = [&](int64_t i) {
      std::array<T*, Operands> rows;
      for (size_t k = 0; k < Operands; ++k) {
        rows[k] = reinterpret_cast<T*>(data[k] + i * strides[k]);
      }
      return rows;
    };
    if (inner == 1) {
      for (int64_t i = 0; i < count; ++i) {
        fn(rows_from(i), Along<T>{n});
      }
    } else if constexpr (std::is_invocable_v<Fn, std::array<T*, Operands>, Across<T>>) {
      const bool neighbours = std::equal(sizes.begin(), sizes.end(), strides);
      const int64_t width = neighbours ? Pack<T>::size : 1;
      for (int64_t i = 0; i < count; i += width) {
        fn(rows_from(i), Across<T>{n, inner, std::min(width, count - i)});
      }
    }
  };
  iter.for_each(loop, std::max<int64_t>(1, at::internal::GRAIN_SIZE / n));
}

// A sum in parts of a few terms each: of a long row in one go, the error grows with the row.
template <class P>
class SumOfParts {
 public:
  void add(const P& a, const P& b = P(1)) {
    // Else it would depend on the compiler whether a product is rounded.
    part_ = fmadd(a, b, part_);
    if (++terms_ == 32) {
      whole_ = whole_ + part_;
      part_ = P();
      terms_ = 0;
    }
  }
  P value() const {
    return whole_ + part_;
  }

 private:
  P whole_, part_;
  int terms_ = 0;
};

}  // namespace gradnorm_kernels::CPU_CAPABILITY
