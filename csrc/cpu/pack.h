// What every CPU kernel loads, computes with and stores: the elements of one vector of T, in the type that
// arithmetic is done in.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <array>
#include <functional>
#include <type_traits>

namespace gradnorm_kernels::CPU_CAPABILITY {

// Nothing loops over the parts: they would be in memory then, not in registers.
template <class T>
struct Pack {
  using Scalar = at::opmath_type<T>;
  using Vector = at::vec::Vectorized<Scalar>;
  static constexpr int64_t size = at::vec::Vectorized<T>::size();
  static constexpr size_t parts = size / Vector::size();  // 2 for half types
  std::array<Vector, parts> part;

  C10_ALWAYS_INLINE Pack() : Pack(Scalar(0)) {}
  C10_ALWAYS_INLINE Pack(Scalar scalar) : Pack(each_part([&](size_t) { return Vector(scalar); })) {}

  // S is T or Scalar. Elements from count on are 0.
  template <class S>
  static C10_ALWAYS_INLINE Pack load(const S* data, int64_t count) {
    if constexpr (std::is_same_v<S, Scalar>) {
      return each_part([&](int64_t k) C10_ALWAYS_INLINE_ATTRIBUTE {
        const int64_t left = count - k * Vector::size();
        return left >= Vector::size() ? Vector::loadu(data + k * Vector::size())
               : left > 0             ? Vector::loadu(data + k * Vector::size(), left)
                                      : Vector(0);
      });
    } else {
      if (count == Vector::size()) {
        Vector low;
        at::vec::load_to_float<S>(data, low);
        return Pack({low, Vector(0)});
      }
      using Stored = at::vec::Vectorized<S>;
      const auto [low, high] =
          at::vec::convert_to_float<S>(count == size ? Stored::loadu(data) : Stored::loadu(data, count));
      return Pack({low, high});
    }
  }
  template <class S>
  C10_ALWAYS_INLINE void store(S* data, int64_t count) const {
    if constexpr (std::is_same_v<S, Scalar>) {
      for_each_part([&](int64_t k) C10_ALWAYS_INLINE_ATTRIBUTE {
        const int64_t left = count - k * Vector::size();
        if (left > 0) {
          part[k].store(data + k * Vector::size(), std::min<int64_t>(left, Vector::size()));
        }
      });
    } else {
      at::vec::convert_from_float<S>(part[0], part[1]).store(data, count);
    }
  }

  // With `rest` from element count on.
  Pack first(int64_t count, Scalar rest) const {
    return each_part([&](int64_t k) {
      const int64_t left = std::clamp<int64_t>(count - k * Vector::size(), 0, Vector::size());
      return Vector::set(Vector(rest), part[k], left);
    });
  }

  template <class Fn>
  static C10_ALWAYS_INLINE void for_each_part(const Fn& fn) {
    fn(0);
    if constexpr (parts == 2) {
      fn(1);
    }
  }
  // fn(k) for part k, and fn of the parts k of packs.
  template <class Fn>
  static C10_ALWAYS_INLINE Pack each_part(const Fn& fn) {
    if constexpr (parts == 2) {
      return Pack({fn(0), fn(1)});
    } else {
      return Pack({fn(0)});
    }
  }
  template <class Fn, class... Packs>
  static C10_ALWAYS_INLINE Pack map(const Fn& fn, const Packs&... packs) {
    return each_part([&](size_t k) C10_ALWAYS_INLINE_ATTRIBUTE { return fn(packs.part[k]...); });
  }
  friend C10_ALWAYS_INLINE Pack operator+(const Pack& a, const Pack& b) {
    return map(std::plus<>(), a, b);
  }
  friend C10_ALWAYS_INLINE Pack operator-(const Pack& a, const Pack& b) {
    return map(std::minus<>(), a, b);
  }
  friend C10_ALWAYS_INLINE Pack operator*(const Pack& a, const Pack& b) {
    return map(std::multiplies<>(), a, b);
  }
  friend C10_ALWAYS_INLINE Pack operator/(const Pack& a, const Pack& b) {
    return map(std::divides<>(), a, b);
  }
  friend C10_ALWAYS_INLINE Pack fmadd(const Pack& a, const Pack& b, const Pack& c) {
    return map([](const auto&... abc) { return at::vec::fmadd(abc...); }, a, b, c);
  }
  friend C10_ALWAYS_INLINE Pack maximum(const Pack& a, const Pack& b) {
    return map([](const auto&... ab) { return at::vec::maximum(ab...); }, a, b);
  }

  // Of all elements; fn reduces two vectors to one.
  template <class Fn>
  Scalar reduce(const Fn& fn) const {
    return at::vec::vec_reduce_all<Scalar>(fn, parts == 2 ? fn(part[0], part[parts - 1]) : part[0]);
  }
  Scalar sum() const {
    return reduce(std::plus<>());
  }
  Scalar max() const {
    return reduce([](const Vector& a, const Vector& b) { return at::vec::maximum(a, b); });
  }

 private:
  C10_ALWAYS_INLINE explicit Pack(const std::array<Vector, parts>& part) : part(part) {}
};

// Part k of each.
template <class P, size_t N>
std::array<typename P::Vector, N> part_of(const std::array<P, N>& packs, size_t k) {
  std::array<typename P::Vector, N> part;
  for (size_t i = 0; i < N; ++i) {
    part[i] = packs[i].part[k];
  }
  return part;
}
template <class P, size_t N>
void set_part(std::array<P, N>& packs, size_t k, const std::array<typename P::Vector, N>& part) {
  for (size_t i = 0; i < N; ++i) {
    packs[i].part[k] = part[i];
  }
}

// body(start, count) for every pack of n elements; count is a compile-time constant but for the last. Before
// that, one of `least` elements may be filled.
template <class P, int64_t least = P::size, class Body>
void for_each_pack(int64_t n, const Body& body) {
  int64_t start = 0;
  for (; start + P::size <= n; start += P::size) {
    body(start, std::integral_constant<int64_t, P::size>());
  }
  if constexpr (least < P::size) {
    if (start + least <= n) {
      body(start, std::integral_constant<int64_t, least>());
      start += least;
    }
  }
  if (start < n) {
    body(start, n - start);
  }
}

// Null for an undefined tensor.
template <class T>
const T* const_data(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}
template <class T>
T* mutable_data(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<T>() : nullptr;
}

// fn(T()) for the dtype T.
template <class Fn>
void dispatch(c10::ScalarType dtype, const Fn& fn) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, dtype, "gradnorm_kernels", [&] { fn(scalar_t()); });
}

}  // namespace gradnorm_kernels::CPU_CAPABILITY
