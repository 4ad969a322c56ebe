// One attention problem (a head of a batch element, or of a window) at a time, so that its scores stay in
// the cache: matrix products, and one fused pass over the rows of scores. Products of this size are too small
// for a BLAS call each.
#include "attention.h"

#include <limits>
#include <memory>

#include "denormals.h"
#include "pack.h"
#include "parallel.h"

namespace gradnorm_kernels::CPU_CAPABILITY {
namespace attention {
namespace {

using at::Tensor;

// T and A are the types of memory and of arithmetic.
template <class A>
constexpr int64_t kWidth = Pack<A>::size;

template <class T>
int64_t whole_vectors(int64_t n) {
  return (n + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
}

// Matrix products. c (rows x columns) = alpha a b, plus c if asked for. Element (i, k) of a is at
// a[i * a.row + k * a.column], so that a transpose costs nothing; rows of b are read in whole vectors.

template <class T>
struct Left {
  const T* data;
  int64_t row, column;
};
template <class T>
struct Rows {
  T* data;
  int64_t row;

  T* at(int64_t i) const {
    return data + i * row;
  }
  Rows from(int64_t i) const {
    return {at(i), row};
  }
  operator Rows<const T>() const {
    return {data, row};
  }
};
template <class T>
Left<std::remove_const_t<T>> plain(Rows<T> m) {
  return {m.data, m.row, 1};
}
template <class T>
Left<T> transposed(Rows<T> m) {
  return {m.data, 1, m.row};
}

// The largest block whose sums stay in registers.
constexpr int kBlockRows = 6;
constexpr int kBlockVectors = sizeof(Pack<float>) >= 64 ? 4 : 2;

// c is of whole vectors: with a count of columns, the sums would go through memory, and every store branch.
template <class T, int R, int N, bool add>
void multiply_block(int64_t depth, T alpha, Left<T> a, Rows<const T> b, Rows<T> c) {
  using P = Pack<T>;
  P sums[R][N];
  for (int64_t k = 0; k < depth; ++k) {
    P right[N];
    for (int j = 0; j < N; ++j) {
      right[j] = P::load(b.at(k) + j * P::size, P::size);
    }
    for (int i = 0; i < R; ++i) {
      const P left(a.data[i * a.row + k * a.column]);
      for (int j = 0; j < N; ++j) {
        sums[i][j] = fmadd(left, right[j], sums[i][j]);
      }
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < N; ++j) {
      T* const out = c.at(i) + j * P::size;
      const P product = sums[i][j] * P(alpha);
      (add ? product + P::load(out, P::size) : product).store(out, P::size);
    }
  }
}

template <class T, int N, bool add, int R = kBlockRows>
void multiply_rows(int64_t rows, int64_t depth, T alpha, Left<T> a, Rows<const T> b, Rows<T> c) {
  if (rows == R) {
    return multiply_block<T, R, N, add>(depth, alpha, a, b, c);
  }
  if constexpr (R > 1) {
    multiply_rows<T, N, add, R - 1>(rows, depth, alpha, a, b, c);
  }
}

template <class T, int N = kBlockVectors>
void multiply_columns(
    int64_t rows, int64_t columns, int64_t depth, T alpha, Left<T> a, Rows<const T> b, bool add, Rows<T> c) {
  if constexpr (N > 1) {
    if (columns <= (N - 1) * kWidth<T>) {
      return multiply_columns<T, N - 1>(rows, columns, depth, alpha, a, b, add, c);
    }
  }
  // Blocks of equal height rather than a low one at the end.
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t start = rows * block / blocks, height = rows * (block + 1) / blocks - start;
    const Left<T> left{a.data + start * a.row, a.row, a.column};
    const Rows<T> target = c.from(start);
    if (columns < N * kWidth<T>) {
      T whole[kBlockRows * N * kWidth<T>];
      multiply_rows<T, N, false>(height, depth, alpha, left, b, {whole, N * kWidth<T>});
      for (int64_t i = 0; i < height; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          const T product = whole[i * N * kWidth<T> + j];
          target.at(i)[j] = add ? target.at(i)[j] + product : product;
        }
      }
    } else if (add) {
      multiply_rows<T, N, true>(height, depth, alpha, left, b, target);
    } else {
      multiply_rows<T, N, false>(height, depth, alpha, left, b, target);
    }
  }
}

template <class T>
void multiply(
    int64_t rows, int64_t columns, int64_t depth, double alpha, Left<T> a, Rows<const T> b, bool add,
    Rows<T> c) {
  constexpr int64_t panel = kBlockVectors * kWidth<T>;
  // A long sum is one of shorter sums, which loses fewer bits, and its panel of b stays in the first-level
  // cache.
  constexpr int64_t most = 64;
  for (int64_t start = 0; start < columns; start += panel) {
    int64_t k = 0;
    do {
      multiply_columns<T>(
          rows, std::min(panel, columns - start), std::min(most, depth - k), static_cast<T>(alpha),
          {a.data + k * a.column, a.row, a.column}, {b.at(k) + start, b.row}, add || k > 0,
          {c.data + start, c.row});
      k += most;
    } while (k < depth);
  }
}

// Rows of scores. Each row is padded to whole vectors; what the padding holds is never read.

// row = softmax(row + mask), all 0 where nothing is attended to.
template <class A>
void softmax_row(A* row, const A* mask, int64_t n) {
  using P = Pack<A>;
  constexpr A infinity = std::numeric_limits<A>::infinity();
  P highest(-infinity);
  for_each_pack<P>(n, [&](int64_t start, auto count) {
    P x = P::load(row + start, count);
    if (mask) {
      x = x + P::load(mask + start, count);
    }
    x = x.first(count, -infinity);
    x.store(row + start, P::size);
    highest = maximum(highest, x);
  });
  const A shift = highest.max();
  if (shift == -infinity) {
    std::fill_n(row, n, static_cast<A>(0));
    return;
  }
  P total;
  for (int64_t start = 0; start < n; start += P::size) {
    const P x = P::map([](const auto& part) { return part.exp(); }, P::load(row + start, P::size) - P(shift));
    x.store(row + start, P::size);
    total = total + x;
  }
  const P factor(static_cast<A>(1) / total.sum());
  for (int64_t start = 0; start < n; start += P::size) {
    (P::load(row + start, P::size) * factor).store(row + start, P::size);
  }
}

// Adds to sums, unless they are null, as well.
template <class A, class Count>
void store_and_accumulate(const Pack<A>& value, A* row, A* sums, int64_t start, Count count) {
  value.store(row + start, count);
  if (sums) {
    (Pack<A>::load(sums + start, count) + value).store(sums + start, count);
  }
}

// dp = dS = p (dp - delta), with delta = sum(p dp).
template <class A>
void backward_row(const A* p, A* dp, A* mask_sums, int64_t n) {
  using P = Pack<A>;
  P total;
  for_each_pack<P>(n, [&](int64_t start, auto count) {
    total = fmadd(P::load(p + start, count), P::load(dp + start, count), total);
  });
  const P delta(total.sum());
  for_each_pack<P>(n, [&](int64_t start, auto count) {
    const P grad = P::load(p + start, count) * (P::load(dp + start, count) - delta);
    store_and_accumulate(grad, dp, mask_sums, start, count);
  });
}

// With alpha = sum(p a) and delta = sum(p dp): dp = dS = p (dp - delta), a = B = p (a - alpha), and c = E =
// p (c' - sum(p c')) of c' = a (dp - delta) - alpha dp + c.
template <class A>
void double_backward_row(const A* p, A* dp, A* a, A* c, A* mask_sums, int64_t n) {
  using P = Pack<A>;
  P total_a, total_dp, total_c;
  for_each_pack<P>(n, [&](int64_t start, auto count) {
    const P probability = P::load(p + start, count);
    total_a = fmadd(probability, P::load(a + start, count), total_a);
    total_dp = fmadd(probability, P::load(dp + start, count), total_dp);
  });
  const P alpha(total_a.sum()), delta(total_dp.sum());
  for_each_pack<P>(n, [&](int64_t start, auto count) {
    const P probability = P::load(p + start, count), x = P::load(a + start, count);
    const P g = P::load(dp + start, count), centred = g - delta;
    const P slope = fmadd(x, centred, P::load(c + start, count)) - alpha * g;
    total_c = fmadd(probability, slope, total_c);
    slope.store(c + start, count);
    (probability * centred).store(dp + start, count);
    (probability * (x - alpha)).store(a + start, count);
  });
  const P gamma(total_c.sum());
  for_each_pack<P>(n, [&](int64_t start, auto count) {
    const P grad = P::load(p + start, count) * (P::load(c + start, count) - gamma);
    store_and_accumulate(grad, c, mask_sums, start, count);
  });
}

// Operands.

template <class T>
struct Batch {
  int64_t rows = 0, columns = 0;

  explicit Batch(const Tensor& t) {
    if (t.defined()) {
      data_ = const_cast<T*>(static_cast<const T*>(t.const_data_ptr()));
      rows = t.size(3);
      columns = t.size(4);
      row_ = t.stride(3);
      for (int d = 0; d < 3; ++d) {
        sizes_[d] = t.size(d);
        strides_[d] = t.stride(d);
      }
    }
  }
  explicit operator bool() const {
    return data_ != nullptr;
  }
  Rows<T> at(int64_t item) const {
    const int64_t last = item % sizes_[2], middle = item / sizes_[2] % sizes_[1];
    const int64_t first = item / (sizes_[2] * sizes_[1]);
    return {data_ + first * strides_[0] + middle * strides_[1] + last * strides_[2], row_};
  }

 private:
  T* data_ = nullptr;
  int64_t row_ = 0;
  int64_t sizes_[3] = {}, strides_[3] = {};
};

// Zeros, because what is read of a row in whole vectors must not be a signalling pattern or slow to add.
template <class T>
std::unique_ptr<T[]> scratch(bool wanted, int64_t n) {
  return wanted ? std::make_unique<T[]>(n) : nullptr;
}

inline void prefetch_line(const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#else
  (void)address;
#endif
}

// An input: one matrix of the batch in the dtype of arithmetic and in rows of whole vectors, copied if it
// is not so already; and its transpose, if wanted.
template <class T, class A>
class Source {
 public:
  Source(const Tensor& t, bool transpose)
      : batch_(t),
        width_(whole_vectors<A>(batch_.columns)),
        height_(whole_vectors<A>(batch_.rows)),
        copy_(scratch<A>(batch_ && needs_copy(), batch_.rows * width_)),
        transpose_(scratch<A>(batch_ && transpose, batch_.columns * height_)) {}

  explicit operator bool() const {
    return static_cast<bool>(batch_);
  }
  void load(int64_t item) {
    if (!batch_) {
      return;
    }
    const Rows<T> rows = batch_.at(item);
    if (copy_) {
      for (int64_t i = 0; i < batch_.rows; ++i) {
        at::vec::convert(rows.at(i), copy_.get() + i * width_, batch_.columns);
      }
      matrix_ = {copy_.get(), width_};
    } else if constexpr (std::is_same_v<T, A>) {
      matrix_ = {rows.data, rows.row};
    }
    if (transpose_) {
      transpose();
    }
  }
  // The next matrix is far from this one in memory: its rows lie between those of other heads.
  void prefetch(int64_t item) const {
    if (!batch_) {
      return;
    }
    const Rows<T> rows = batch_.at(item);
    for (int64_t i = 0; i < batch_.rows; ++i) {
      for (int64_t j = 0; j < batch_.columns; j += kLine) {
        prefetch_line(rows.at(i) + j);
      }
    }
  }
  Rows<const A> rows(int64_t first = 0) const {
    return matrix_.from(first);
  }
  Rows<const A> columns() const {
    return {transpose_.get(), height_};
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);

  bool needs_copy() const {
    return !std::is_same_v<T, A> || width_ != batch_.columns;
  }
  void transpose() {
    constexpr int64_t block = 16;
    for (int64_t i = 0; i < batch_.rows; i += block) {
      for (int64_t j = 0; j < batch_.columns; j += block) {
        const int64_t height = std::min(block, batch_.rows - i), width = std::min(block, batch_.columns - j);
        const A* const from = matrix_.at(i) + j;
        A* const to = transpose_.get() + j * height_ + i;
        if (height == block && width == block) {
          at::vec::transpose_mxn<A, block, block>(from, matrix_.row, to, height_);
          continue;
        }
        for (int64_t m = 0; m < height; ++m) {
          for (int64_t n = 0; n < width; ++n) {
            to[n * height_ + m] = from[m * matrix_.row + n];
          }
        }
      }
    }
  }

  Batch<T> batch_;
  int64_t width_, height_;
  std::unique_ptr<A[]> copy_, transpose_;
  Rows<const A> matrix_{};
};

// A result: written in the dtype of arithmetic, and converted if it is of another.
template <class T, class A>
class Target {
 public:
  explicit Target(const Tensor& t)
      : batch_(t), copy_(scratch<A>(batch_ && !std::is_same_v<T, A>, batch_.rows * batch_.columns)) {}

  explicit operator bool() const {
    return static_cast<bool>(batch_);
  }
  void begin(int64_t item) {
    if (batch_) {
      target_ = batch_.at(item);
    }
  }
  Rows<A> rows(int64_t first = 0) const {
    if constexpr (std::is_same_v<T, A>) {
      return target_.from(first);
    } else {
      return Rows<A>{copy_.get(), batch_.columns}.from(first);
    }
  }
  void finish() {
    if (copy_) {
      for (int64_t i = 0; i < batch_.rows; ++i) {
        at::vec::convert(copy_.get() + i * batch_.columns, target_.at(i), batch_.columns);
      }
    }
  }

 private:
  Batch<T> batch_;
  std::unique_ptr<A[]> copy_;
  Rows<T> target_{};
};

enum class Pass { kForward, kBackward, kDoubleBackward };

template <class T, Pass pass>
class Worker {
  using A = at::opmath_type<T>;
  static constexpr bool kDifferentiates = pass != Pass::kForward;
  static constexpr bool kTwice = pass == Pass::kDoubleBackward;

 public:
  explicit Worker(const AttentionProblem& p)
      : rows_(p.query.size(3)),
        keys_(p.key.size(3)),
        depth_(p.query.size(4)),
        width_(p.value.size(4)),
        scale_(p.scale),
        ld_(whole_vectors<A>(keys_)),
        tile_(tile_rows()),
        query_(p.query, false),
        key_(p.key, true),
        value_(p.value, kDifferentiates),
        grad_output_(p.grad_output, false),
        grad_grad_query_(p.grad_grad_query, false),
        grad_grad_key_(p.grad_grad_key, true),
        grad_grad_value_(p.grad_grad_value, true),
        mask_(p.attn_mask),
        grad_grad_mask_(p.grad_grad_attn_mask),
        output_(p.output),
        grad_grad_output_(p.grad_grad_output),
        grad_query_(p.grad_query),
        grad_key_(p.grad_key),
        grad_value_(p.grad_value) {
    for (int64_t n = 0; n < kBuffers; ++n) {
      buffers_[n] = scratch<A>(true, tile_ * ld_);
    }
  }

  // mask_sums: to which the gradient of the mask is added, or null. next: the item that comes after this one.
  void run(int64_t item, int64_t next, A* mask_sums) {
    for (auto* source :
         {&query_, &key_, &value_, &grad_output_, &grad_grad_query_, &grad_grad_key_, &grad_grad_value_}) {
      source->load(item);
      source->prefetch(next);
    }
    for (auto* target : {&output_, &grad_grad_output_, &grad_query_, &grad_key_, &grad_value_}) {
      target->begin(item);
    }
    // At least one tile, which writes the zeros of empty sums.
    int64_t start = 0;
    do {
      const int64_t end = std::min(start + tile_, rows_);
      tile(item, start, end - start, mask_sums ? mask_sums + start * keys_ : nullptr);
      start = end;
    } while (start < rows_);
    for (auto* target : {&output_, &grad_grad_output_, &grad_query_, &grad_key_, &grad_value_}) {
      target->finish();
    }
  }

 private:
  static constexpr int64_t kBuffers = pass == Pass::kForward ? 1 : pass == Pass::kBackward ? 2 : 4;

  // So many rows that their scores stay in the second-level cache.
  int64_t tile_rows() const {
    constexpr int64_t cache = 512 * 1024, least = 32;
    const int64_t fitting = cache / std::max<int64_t>(1, kBuffers * ld_ * sizeof(A));
    const int64_t tiles =
        std::max<int64_t>(1, (rows_ + std::max(fitting, least) - 1) / std::max(fitting, least));
    return (rows_ + tiles - 1) / tiles;
  }

  Rows<A> buffer(int64_t n) const {
    return {buffers_[n].get(), ld_};
  }
  // scores = alpha left right^T
  void make_scores(
      int64_t n, Rows<A> scores, int64_t depth, double alpha, Rows<const A> left, const Source<T, A>& right,
      bool add = false) {
    multiply<A>(n, ld_, depth, alpha, plain(left), right.columns(), add, scores);
  }
  // target = alpha scores right
  void to_queries(
      int64_t n, Rows<A> target, int64_t columns, double alpha, Rows<A> scores, const Source<T, A>& right,
      bool add = false) {
    multiply<A>(n, columns, keys_, alpha, plain(scores), right.rows(), add, target);
  }
  // target = alpha scores^T right
  void to_keys(
      int64_t n, Rows<A> target, int64_t columns, double alpha, Rows<A> scores, Rows<const A> right,
      bool add) {
    multiply<A>(keys_, columns, n, alpha, transposed(scores), right, add, target);
  }

  void tile(int64_t item, int64_t start, int64_t n, A* mask_sums) {
    const bool add = start > 0;
    const Rows<A> p = buffer(0);
    make_scores(n, p, depth_, scale_, query_.rows(start), key_);
    for (int64_t i = 0; i < n; ++i) {
      softmax_row(p.at(i), mask_ ? mask_.at(item).at(start + i) : nullptr, keys_);
    }
    if constexpr (pass == Pass::kForward) {
      to_queries(n, output_.rows(start), width_, 1, p, value_);
    }
    if constexpr (kDifferentiates) {
      const Rows<A> ds = buffer(1);
      make_scores(n, ds, width_, 1, grad_output_.rows(start), value_);
      if constexpr (pass == Pass::kBackward) {
        for (int64_t i = 0; i < n; ++i) {
          backward_row(p.at(i), ds.at(i), mask_sums ? mask_sums + i * keys_ : nullptr, keys_);
        }
        if (grad_query_) {
          to_queries(n, grad_query_.rows(start), depth_, scale_, ds, key_);
        }
        if (grad_key_) {
          to_keys(n, grad_key_.rows(), depth_, scale_, ds, query_.rows(start), add);
        }
        if (grad_value_) {
          to_keys(n, grad_value_.rows(), width_, 1, p, grad_output_.rows(start), add);
        }
      } else {
        double_backward_tile(item, start, n, mask_sums);
      }
    }
  }

  void double_backward_tile(int64_t item, int64_t start, int64_t n, A* mask_sums) {
    const bool add = start > 0;
    using P = Pack<A>;
    const Rows<A> p = buffer(0), ds = buffer(1), a = buffer(2), c = buffer(3);
    if (grad_grad_query_) {
      make_scores(n, a, depth_, scale_, grad_grad_query_.rows(start), key_);
    }
    if (grad_grad_key_) {
      make_scores(
          n, a, depth_, scale_, query_.rows(start), grad_grad_key_, static_cast<bool>(grad_grad_query_));
    }
    if (!grad_grad_query_ && !grad_grad_key_) {
      std::fill_n(a.data, n * ld_, static_cast<A>(0));
    }
    if (grad_grad_value_) {
      make_scores(n, c, width_, 1, grad_output_.rows(start), grad_grad_value_);
    } else {
      std::fill_n(c.data, n * ld_, static_cast<A>(0));
    }
    for (int64_t i = 0; i < n; ++i) {
      if (grad_grad_mask_) {
        const A* const extra = grad_grad_mask_.at(item).at(start + i);
        for_each_pack<P>(keys_, [&](int64_t j, auto count) {
          (P::load(a.at(i) + j, count) + P::load(extra + j, count)).store(a.at(i) + j, count);
        });
      }
      double_backward_row(
          p.at(i), ds.at(i), a.at(i), c.at(i), mask_sums ? mask_sums + i * keys_ : nullptr, keys_);
    }
    if (grad_grad_output_) {
      to_queries(n, grad_grad_output_.rows(start), width_, 1, a, value_);
      if (grad_grad_value_) {
        to_queries(n, grad_grad_output_.rows(start), width_, 1, p, grad_grad_value_, true);
      }
    }
    if (grad_value_) {
      to_keys(n, grad_value_.rows(), width_, 1, a, grad_output_.rows(start), add);
    }
    if (grad_query_) {
      to_queries(n, grad_query_.rows(start), depth_, scale_, c, key_);
      if (grad_grad_key_) {
        to_queries(n, grad_query_.rows(start), depth_, scale_, ds, grad_grad_key_, true);
      }
    }
    if (grad_key_) {
      to_keys(n, grad_key_.rows(), depth_, scale_, c, query_.rows(start), add);
      if (grad_grad_query_) {
        to_keys(n, grad_key_.rows(), depth_, scale_, ds, grad_grad_query_.rows(start), true);
      }
    }
  }

  int64_t rows_, keys_, depth_, width_;
  double scale_;
  int64_t ld_, tile_;
  Source<T, A> query_, key_, value_, grad_output_, grad_grad_query_, grad_grad_key_, grad_grad_value_;
  Batch<A> mask_, grad_grad_mask_;
  Target<T, A> output_, grad_grad_output_, grad_query_, grad_key_, grad_value_;
  std::unique_ptr<A[]> buffers_[kBuffers];
};

template <Pass pass>
void run(const AttentionProblem& p) {
  const int64_t items = p.query.size(0) * p.query.size(1) * p.query.size(2);
  const bool sums = p.grad_attn_mask.defined();
  const int64_t parts = sums ? p.grad_attn_mask.size(0) : 1;
  const int64_t tiles = sums ? p.grad_attn_mask.size(1) : items;
  const int64_t repeats = tiles == 0 ? 0 : items / tiles;
  dispatch(p.query.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = at::opmath_type<T>;
    const int64_t tile_size = p.query.size(3) * p.key.size(3);
    A* const mask_sums = sums ? p.grad_attn_mask.mutable_data_ptr<A>() : nullptr;
    gradnorm_kernels::parallel_for(0, parts * tiles, 1, [&](int64_t begin, int64_t end) {
      const FlushDenormals flush;
      Worker<T, pass> worker(p);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task / tiles, tile = task % tiles;
        A* const own = sums ? mask_sums + task * tile_size : nullptr;
        if (own) {
          std::fill_n(own, tile_size, static_cast<A>(0));
        }
        for (int64_t repeat = part; repeat < repeats; repeat += parts) {
          const int64_t item = repeat * tiles + tile;
          const int64_t next = repeats == 1 ? item + 1 : item + parts * tiles;
          worker.run(item, std::min(next, items - 1), own);
        }
      }
    });
  });
}

}  // namespace
}  // namespace attention

const AttentionKernels attention_kernels{
    attention::run<attention::Pass::kForward>, attention::run<attention::Pass::kBackward>,
    attention::run<attention::Pass::kDoubleBackward>};

}  // namespace gradnorm_kernels::CPU_CAPABILITY
