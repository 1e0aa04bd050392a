// Uninitialised working memory of a call.
#pragma once

#include <cstdint>

namespace drope {

// `count` floats on a cache line of their own; throws std::bad_alloc. Compiled once, outside the
// per-ISA files: an inline function of this namespace would be shared by them.
class Scratch {
 public:
  explicit Scratch(int64_t count);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const;

 private:
  float* data_;
};

}  // namespace drope
