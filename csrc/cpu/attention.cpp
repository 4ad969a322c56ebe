// One attention problem (a head of a batch element, or of a window) at a time, so that its scores stay in
// the cache: matrix products, and one fused pass over the rows of scores. Products of this size are too small
// for a BLAS call each.
#include "attention.h"

#include <ATen/native/CPUBlas.h>

#include <cstring>
#include <limits>
#include <variant>

#include "../elementary.h"
#include "buffer.h"
#include "denormals.h"
#include "pack.h"
#include "parallel.h"

namespace gradnorm_kernels::CPU_CAPABILITY {
namespace attention {
namespace {

using at::Tensor;

// T and A are the types of memory and of arithmetic, and E is that of the operands of products: A or, where
// the processor multiplies bfloat16 in tiles, that. Its vector instructions for bfloat16 would be no faster
// than those for float32.
template <class E>
constexpr bool kTiles = std::is_same_v<E, at::BFloat16>;

constexpr int64_t rounded_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}
template <class T>
int64_t whole_vectors(int64_t n) {
  return rounded_up(n, Pack<T>::size);
}

// A matrix of whole rows.
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

// A transpose goes by square blocks of so many rows.
template <class T>
constexpr int64_t kBlock = sizeof(T) < sizeof(float) ? 32 : 16;

// to = the transpose of from, which has these rows and columns.
template <class T>
void transpose(int64_t rows, int64_t columns, Rows<const T> from, Rows<T> to) {
  constexpr int64_t block = kBlock<T>;
  for (int64_t i = 0; i < rows; i += block) {
    for (int64_t j = 0; j < columns; j += block) {
      const int64_t height = std::min(block, rows - i), width = std::min(block, columns - j);
      const T* const source = from.at(i) + j;
      T* const target = to.at(j) + i;
      if (height == block && width == block) {
        at::vec::transpose_mxn<T, block, block>(source, from.row, target, to.row);
        continue;
      }
      for (int64_t m = 0; m < height; ++m) {
        for (int64_t n = 0; n < width; ++n) {
          std::memcpy(target + n * to.row + m, source + m * from.row + n, sizeof(T));
        }
      }
    }
  }
}

// Matrix products. c (rows x columns) = alpha a b, plus c if asked for. Element (i, k) of a is at
// a[i * a.row + k * a.column], so that a transpose costs nothing; rows of b are read in whole vectors.

template <class T>
struct Left {
  const T* data;
  int64_t row, column;
};
template <class T>
Left<std::remove_const_t<T>> plain(Rows<T> m) {
  return {m.data, m.row, 1};
}
template <class T>
Left<std::remove_const_t<T>> transposed(Rows<T> m) {
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
    if (columns <= (N - 1) * Pack<T>::size) {
      return multiply_columns<T, N - 1>(rows, columns, depth, alpha, a, b, add, c);
    }
  }
  // Blocks of equal height rather than a low one at the end.
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t start = rows * block / blocks, height = rows * (block + 1) / blocks - start;
    const Left<T> left{a.data + start * a.row, a.row, a.column};
    const Rows<T> target = c.from(start);
    if (columns < N * Pack<T>::size) {
      T whole[kBlockRows * N * Pack<T>::size];
      multiply_rows<T, N, false>(height, depth, alpha, left, b, {whole, N * Pack<T>::size});
      for (int64_t i = 0; i < height; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          const T product = whole[i * N * Pack<T>::size + j];
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
    int64_t rows, int64_t columns, int64_t depth, T alpha, Left<T> a, Rows<const T> b, bool add, Rows<T> c) {
  constexpr int64_t panel = kBlockVectors * Pack<T>::size;
  // A long sum is one of shorter sums, which loses fewer bits, and its panel of b stays in the first-level
  // cache.
  constexpr int64_t most = 64;
  for (int64_t start = 0; start < columns; start += panel) {
    int64_t k = 0;
    do {
      multiply_columns<T>(
          rows, std::min(panel, columns - start), std::min(most, depth - k), alpha,
          {a.data + k * a.column, a.row, a.column}, {b.at(k) + start, b.row}, add || k > 0,
          {c.data + start, c.row});
      k += most;
    } while (k < depth);
  }
}

// The same of bfloat16, in tiles, which are fastest where they are whole. Rows of b are in pairs: element (k,
// j) is at b.at(k / 2)[2 * j + k % 2]. An odd depth is padded by zeros in both, and columns to whole vectors
// of float32 in b and c.
inline void multiply(
    int64_t rows, int64_t columns, int64_t depth, Left<at::BFloat16> a, Rows<const at::BFloat16> b, bool add,
    Rows<float> c) {
  if (rows == 0 || columns == 0) {
    return;
  }
  columns = whole_vectors<float>(columns);
  if (depth > 0) {
    at::native::cpublas::brgemm(
        rows, columns, rounded_up(depth, 2), a.row, b.row / 2, c.row, add, a.data, b.data, c.data);
    return;
  }
  for (int64_t i = 0; i < rows && !add; ++i) {
    std::fill_n(c.at(i), columns, 0.0f);
  }
}

// A thread's tiles are its own again, once it has multiplied what it has to.
struct ReleaseTiles {
  ReleaseTiles() = default;
  ReleaseTiles(const ReleaseTiles&) = delete;
  ReleaseTiles& operator=(const ReleaseTiles&) = delete;
  ~ReleaseTiles() {
    at::native::cpublas::brgemm_release();
  }
};

// Rows of scores, padded to whole vectors of E. They become operands of products where they are: of tiles,
// padded by 0; else the padding is never read.

template <class E, class A>
E* as_operand(A* row) {
  return reinterpret_cast<E*>(row);
}
template <class E, class A>
void store_operand(const Pack<E>& value, A* row, int64_t start) {
  value.store(as_operand<E>(row) + start, Pack<E>::size);
}

// For the gradients of query and key, since products in tiles have no factor of their own.
template <class E, class A>
Pack<E> scaled(const Pack<E>& value, A scale) {
  if constexpr (kTiles<E>) {
    return value * Pack<E>(scale);
  } else {
    return value;
  }
}

// row = softmax(scale row + mask), all 0 where nothing is attended to. Stored as Out, A or E.
template <class E, class Out, class A>
void softmax_row(A* row, A scale, const A* mask, int64_t n) {
  using P = Pack<E>;
  constexpr A infinity = std::numeric_limits<A>::infinity();
  P highest(-infinity);
  for_each_pack<P>(n, [&](int64_t start, auto count) {
    P x = P::load(row + start, count) * P(scale);
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
    // Rounded to bfloat16, it may be off by more than a rounding of float32, and is made in half the time.
    const auto exp = [](const auto& part) { return kTiles<E> ? exp_nonpositive(part) : part.exp(); };
    const P x = P::map(exp, P::load(row + start, P::size) - P(shift));
    x.store(row + start, P::size);
    total = total + x;
  }
  const P factor(static_cast<A>(1) / total.sum());
  for (int64_t start = 0; start < n; start += P::size) {
    const P p = P::load(row + start, P::size) * factor;
    p.store(as_operand<Out>(row) + start, P::size);
  }
}

// Adds to sums, unless they are null, as well.
template <class E, class A, class Count>
void store_and_accumulate(const Pack<E>& value, A scale, A* row, A* sums, int64_t start, Count count) {
  store_operand(scaled(value, scale), row, start);
  if (sums) {
    (Pack<E>::load(sums + start, count) + value).store(sums + start, count);
  }
}

// dp = dS = p (dp - delta), with delta = sum(p dp), scaled for tiles. mask_sums add up dS.
template <class E, class A>
void backward_row(A* p, A* dp, A scale, A* mask_sums, int64_t n) {
  using P = Pack<E>;
  P total;
  for_each_pack<P>(n, [&](int64_t start, auto count) {
    total = fmadd(P::load(p + start, count), P::load(dp + start, count), total);
  });
  const P delta(total.sum());
  for_each_pack<P>(n, [&](int64_t start, auto count) {
    const P probability = P::load(p + start, count);
    const P grad = probability * (P::load(dp + start, count) - delta);
    if constexpr (kTiles<E>) {
      store_operand(probability, p, start);
    }
    store_and_accumulate(grad, scale, dp, mask_sums, start, count);
  });
}

// With a' = scale a + grad_grad_mask, alpha = sum(p a') and delta = sum(p dp): dp = dS = p (dp - delta), a =
// B = p (a' - alpha), and c = E = p (c' - sum(p c')) of c' = a' (dp - delta) - alpha dp + c, dS and E scaled
// for tiles. mask_sums add up E.
template <class E, class A>
void double_backward_row(A* p, A* dp, A* a, A* c, A scale, const A* grad_grad_mask, A* mask_sums, int64_t n) {
  using P = Pack<E>;
  const auto grad_grad_score = [&](int64_t start, auto count) {
    const P scaled = P::load(a + start, count) * P(scale);
    return grad_grad_mask ? scaled + P::load(grad_grad_mask + start, count) : scaled;
  };
  P total_a, total_dp, total_c;
  for_each_pack<P>(n, [&](int64_t start, auto count) {
    const P probability = P::load(p + start, count);
    total_a = fmadd(probability, grad_grad_score(start, count), total_a);
    total_dp = fmadd(probability, P::load(dp + start, count), total_dp);
  });
  const P alpha(total_a.sum()), delta(total_dp.sum());
  for_each_pack<P>(n, [&](int64_t start, auto count) {
    const P probability = P::load(p + start, count), x = grad_grad_score(start, count);
    const P g = P::load(dp + start, count), centred = g - delta;
    const P slope = fmadd(x, centred, P::load(c + start, count)) - alpha * g;
    total_c = fmadd(probability, slope, total_c);
    slope.store(c + start, count);
    store_operand(scaled(probability * centred, scale), dp, start);
    store_operand(probability * (x - alpha), a, start);
  });
  const P gamma(total_c.sum());
  for_each_pack<P>(n, [&](int64_t start, auto count) {
    const P probability = P::load(p + start, count);
    const P grad = probability * (P::load(c + start, count) - gamma);
    if constexpr (kTiles<E>) {
      store_operand(probability, p, start);
    }
    store_and_accumulate(grad, scale, c, mask_sums, start, count);
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
Buffer<T> scratch(bool wanted, int64_t n) {
  return wanted ? zeros<T>(n) : nullptr;
}

inline void prefetch_line(const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#else
  (void)address;
#endif
}

// An input: one matrix of the batch as a left operand of products, copied if it is not one already, and as
// right ones, it itself and its transpose.
template <class T, class E>
class Source {
 public:
  // by_columns and by_rows: whether the transpose and the matrix itself are right operands.
  Source(const Tensor& t, bool by_columns, bool by_rows)
      : batch_(t),
        width_(kTiles<E> ? rounded_up(batch_.columns, kGroup) : whole_vectors<E>(batch_.columns)),
        copy_(scratch<E>(batch_ && !is_left(t), batch_.rows * width_)),
        columns_(batch_ && by_columns, rounded_up(batch_.columns, kGroup), whole_vectors<E>(batch_.rows)),
        rows_(
            kTiles<E> && batch_ && by_rows, rounded_up(batch_.rows, kBlock<E>),
            whole_vectors<float>(batch_.columns)) {}

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
    } else if constexpr (std::is_same_v<T, E>) {
      matrix_ = {rows.data, rows.row};
    }
    if (columns_.data) {
      // A group moves as one.
      using Group = std::conditional_t<kTiles<E>, float, E>;
      transpose(
          batch_.rows, rounded_up(batch_.columns, kGroup) / kGroup,
          Rows<const Group>{reinterpret_cast<const Group*>(matrix_.data), matrix_.row / kGroup},
          Rows<Group>{reinterpret_cast<Group*>(columns_.data.get()), columns_.width});
    }
    if (rows_.data) {
      interleave();
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
  Rows<const E> left(int64_t first) const {
    return matrix_.from(first);
  }
  // first: even.
  Rows<const E> rows(int64_t first = 0) const {
    return kTiles<E> ? rows_.all().from(first / kGroup) : matrix_.from(first);
  }
  Rows<const E> columns() const {
    return columns_.all();
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  // Rows of a right operand whose elements alternate in memory.
  static constexpr int64_t kGroup = kTiles<E> ? 2 : 1;

  struct Right {
    int64_t width;
    Buffer<E> data;

    Right(bool wanted, int64_t height, int64_t width)
        : width(width), data(scratch<E>(wanted, height * width)) {}
    Rows<const E> all() const {
      return {data.get(), width * kGroup};
    }
  };

  // Whether a matrix of the batch is a left operand: in groups that can be read as one.
  bool is_left(const Tensor& t) const {
    bool is_grouped = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % (kGroup * sizeof(T)) == 0;
    for (const int64_t stride : t.strides().slice(0, 4)) {
      is_grouped = is_grouped && stride % kGroup == 0;
    }
    return std::is_same_v<T, E> && width_ == batch_.columns && is_grouped;
  }
  // By what compilers make vectors of.
  void interleave() {
    for (int64_t i = 0; i < batch_.rows; i += kGroup) {
      const auto* const even = reinterpret_cast<const uint16_t*>(matrix_.at(i));
      const auto* const odd = reinterpret_cast<const uint16_t*>(matrix_.at(i + 1));
      auto* const pairs = reinterpret_cast<uint32_t*>(rows_.data.get() + i * rows_.width);
      const bool is_alone = i + 1 == batch_.rows;
      for (int64_t j = 0; j < batch_.columns; ++j) {
        pairs[j] = is_alone ? even[j] : even[j] | static_cast<uint32_t>(odd[j]) << 16;
      }
    }
  }

  Batch<T> batch_;
  int64_t width_;
  Buffer<E> copy_;
  Right columns_, rows_;
  Rows<const E> matrix_{};
};

// A result: written in the dtype of arithmetic, and converted if it is of another.
template <class T, class A>
class Target {
 public:
  explicit Target(const Tensor& t)
      : batch_(t),
        width_(whole_vectors<A>(batch_.columns)),
        copy_(scratch<A>(batch_ && !std::is_same_v<T, A>, rounded_up(batch_.rows, kBlock<T>) * width_)) {}

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
      return Rows<A>{copy_.get(), width_}.from(first);
    }
  }
  void finish() {
    if (copy_) {
      for (int64_t i = 0; i < batch_.rows; ++i) {
        at::vec::convert(copy_.get() + i * width_, target_.at(i), batch_.columns);
      }
    }
  }

 private:
  Batch<T> batch_;
  int64_t width_;
  Buffer<A> copy_;
  Rows<T> target_{};
};

enum class Pass { kForward, kBackward, kDoubleBackward };

template <class T, class E, Pass pass>
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
        scale_(static_cast<A>(p.scale)),
        ld_(whole_vectors<E>(keys_)),
        tile_(tile_rows()),
        query_(p.query, false, p.grad_key.defined()),
        key_(p.key, true, p.grad_query.defined()),
        value_(p.value, kDifferentiates, !kDifferentiates || p.grad_grad_output.defined()),
        grad_output_(p.grad_output, false, p.grad_value.defined()),
        grad_grad_query_(p.grad_grad_query, false, p.grad_key.defined()),
        grad_grad_key_(p.grad_grad_key, true, p.grad_query.defined()),
        grad_grad_value_(p.grad_grad_value, true, p.grad_grad_output.defined()),
        mask_(p.attn_mask),
        grad_grad_mask_(p.grad_grad_attn_mask),
        output_(p.output),
        grad_grad_output_(p.grad_grad_output),
        grad_query_(p.grad_query),
        grad_key_(p.grad_key),
        grad_value_(p.grad_value),
        transpose_(scratch<E>(kTiles<E> && kDifferentiates, whole_blocks(keys_) * tile_)) {
    for (auto& buffer : buffers_) {
      buffer = scratch<A>(true, tile_ * ld_);
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
    return whole_blocks((rows_ + tiles - 1) / tiles);
  }
  // Products in tiles take whole blocks of the rows of scores, too.
  static int64_t whole_blocks(int64_t rows) {
    return kTiles<E> ? rounded_up(rows, kBlock<E>) : rows;
  }

  Rows<A> buffer(int64_t n) const {
    return {buffers_[n].get(), ld_};
  }
  Rows<const E> operand(Rows<A> scores) const {
    return {as_operand<E>(scores.data), scores.row * static_cast<int64_t>(sizeof(A) / sizeof(E))};
  }
  // scores = left right^T
  void make_scores(
      int64_t n, Rows<A> scores, int64_t depth, Rows<const E> left, const Source<T, E>& right,
      bool add = false) {
    if constexpr (kTiles<E>) {
      multiply(n, ld_, depth, plain(left), right.columns(), add, scores);
    } else {
      multiply(n, ld_, depth, A(1), plain(left), right.columns(), add, scores);
    }
  }
  // target = alpha scores right. Of tiles, scores are scaled already.
  void to_queries(
      int64_t n, Rows<A> target, int64_t columns, A alpha, Rows<A> scores, const Source<T, E>& right,
      bool add = false) {
    const auto left = plain(operand(scores));
    if constexpr (kTiles<E>) {
      multiply(whole_blocks(n), columns, whole_blocks(keys_), left, right.rows(), add, target);
    } else {
      multiply(n, columns, keys_, alpha, left, right.rows(), add, target);
    }
  }
  // target = alpha scores^T right, likewise.
  void to_keys(
      int64_t n, Rows<A> target, int64_t columns, A alpha, Rows<A> scores, Rows<const E> right, bool add) {
    if constexpr (kTiles<E>) {
      const int64_t height = whole_blocks(n), width = whole_blocks(keys_);
      std::fill_n(as_operand<E>(scores.at(n)), (height - n) * 2 * ld_, E(0));
      const Rows<E> left{transpose_.get(), tile_};
      transpose(height, width, operand(scores), left);
      multiply(width, columns, height, plain(left), right, add, target);
    } else {
      multiply(keys_, columns, n, alpha, transposed(operand(scores)), right, add, target);
    }
  }

  void tile(int64_t item, int64_t start, int64_t n, A* mask_sums) {
    const bool add = start > 0;
    const Rows<A> p = buffer(0);
    make_scores(n, p, depth_, query_.left(start), key_);
    for (int64_t i = 0; i < n; ++i) {
      softmax_row<E, std::conditional_t<kDifferentiates, A, E>>(
          p.at(i), scale_, mask_ ? mask_.at(item).at(start + i) : nullptr, keys_);
    }
    if constexpr (pass == Pass::kForward) {
      to_queries(n, output_.rows(start), width_, 1, p, value_);
    }
    if constexpr (kDifferentiates) {
      const Rows<A> ds = buffer(1);
      make_scores(n, ds, width_, grad_output_.left(start), value_);
      if constexpr (pass == Pass::kBackward) {
        for (int64_t i = 0; i < n; ++i) {
          backward_row<E>(p.at(i), ds.at(i), scale_, mask_sums ? mask_sums + i * keys_ : nullptr, keys_);
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
    const Rows<A> p = buffer(0), ds = buffer(1), a = buffer(2), c = buffer(3);
    if (grad_grad_query_) {
      make_scores(n, a, depth_, grad_grad_query_.left(start), key_);
    }
    if (grad_grad_key_) {
      make_scores(n, a, depth_, query_.left(start), grad_grad_key_, static_cast<bool>(grad_grad_query_));
    }
    if (!grad_grad_query_ && !grad_grad_key_) {
      std::fill_n(a.data, n * ld_, static_cast<A>(0));
    }
    if (grad_grad_value_) {
      make_scores(n, c, width_, grad_output_.left(start), grad_grad_value_);
    } else {
      std::fill_n(c.data, n * ld_, static_cast<A>(0));
    }
    for (int64_t i = 0; i < n; ++i) {
      double_backward_row<E>(
          p.at(i), ds.at(i), a.at(i), c.at(i), scale_,
          grad_grad_mask_ ? grad_grad_mask_.at(item).at(start + i) : nullptr,
          mask_sums ? mask_sums + i * keys_ : nullptr, keys_);
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

  // Tiles are released once all is done.
  [[no_unique_address]] std::conditional_t<kTiles<E>, ReleaseTiles, std::monostate> release_;
  int64_t rows_, keys_, depth_, width_;
  A scale_;
  int64_t ld_, tile_;
  Source<T, E> query_, key_, value_, grad_output_, grad_grad_query_, grad_grad_key_, grad_grad_value_;
  Batch<A> mask_, grad_grad_mask_;
  Target<T, A> output_, grad_grad_output_, grad_query_, grad_key_, grad_value_;
  Buffer<E> transpose_;
  Buffer<A> buffers_[kBuffers];
};

template <class T, class E, Pass pass>
void run(const AttentionProblem& p) {
  using A = at::opmath_type<T>;
  const int64_t items = p.query.size(0) * p.query.size(1) * p.query.size(2);
  const bool sums = p.grad_attn_mask.defined();
  const int64_t parts = sums ? p.grad_attn_mask.size(0) : 1;
  const int64_t tiles = sums ? p.grad_attn_mask.size(1) : items;
  const int64_t repeats = tiles == 0 ? 0 : items / tiles;
  const int64_t tile_size = p.query.size(3) * p.key.size(3);
  A* const mask_sums = sums ? p.grad_attn_mask.mutable_data_ptr<A>() : nullptr;
  gradnorm_kernels::parallel_for(0, parts * tiles, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    Worker<T, E, pass> worker(p);
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
}

template <Pass pass>
void run_in_dtype(const AttentionProblem& p) {
  dispatch(p.query.scalar_type(), [&](auto type) {
    using T = decltype(type);
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (kTiles<T>) {
      if (at::native::cpublas::could_pack(at::kBFloat16)) {
        return run<T, T, pass>(p);
      }
    }
#endif
    run<T, at::opmath_type<T>, pass>(p);
  });
}

}  // namespace
}  // namespace attention

const AttentionKernels attention_kernels{
    attention::run_in_dtype<attention::Pass::kForward>, attention::run_in_dtype<attention::Pass::kBackward>,
    attention::run_in_dtype<attention::Pass::kDoubleBackward>};

}  // namespace gradnorm_kernels::CPU_CAPABILITY
