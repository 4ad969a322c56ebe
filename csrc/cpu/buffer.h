// Memory of a task's own.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <memory>

namespace gradnorm_kernels::CPU_CAPABILITY {

template <class T>
struct Deallocate {
  void operator()(T* data) const {
    c10::GetCPUAllocator()->raw_deallocate(data);
  }
};
template <class T>
using Buffer = std::unique_ptr<T[], Deallocate<T>>;

// From PyTorch's allocator, which aligns to vectors: what lies across two lines of the cache is read and
// written at half the speed.
template <class T>
Buffer<T> zeros(int64_t size) {
  Buffer<T> buffer(static_cast<T*>(c10::GetCPUAllocator()->raw_allocate(size * sizeof(T))));
  std::fill_n(buffer.get(), size, T(0));
  return buffer;
}

// Uninitialised memory that the thread keeps, for one use at a time.
template <class T>
T* thread_scratch(int64_t size) {
  thread_local Buffer<T> buffer;
  thread_local int64_t held = 0;
  if (held < size) {
    buffer.reset(static_cast<T*>(c10::GetCPUAllocator()->raw_allocate(size * sizeof(T))));
    held = size;
  }
  return buffer.get();
}

}  // namespace gradnorm_kernels::CPU_CAPABILITY
