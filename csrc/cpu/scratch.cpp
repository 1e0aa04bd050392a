#include "cpu/scratch.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace drope {

namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::size_t round_up(std::size_t bytes, std::size_t multiple) {
  return (bytes + multiple - 1) / multiple * multiple;
}

}  // namespace

Scratch::Scratch(int64_t count) {
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(float);
  // Large memory is fresh from the system at every call; in huge pages it costs far fewer faults.
  const bool huge = bytes >= 2 * kHugePage;
  const std::size_t alignment = huge ? kHugePage : 64;
  const std::size_t size = round_up(bytes == 0 ? 1 : bytes, alignment);
  data_ = static_cast<float*>(std::aligned_alloc(alignment, size));
  if (data_ == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (huge) madvise(data_, size, MADV_HUGEPAGE);  // a wish: failure only means small pages
#endif
}

Scratch::~Scratch() { std::free(data_); }

float* Scratch::data() const { return data_; }

}  // namespace drope
