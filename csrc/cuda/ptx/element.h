// Tags for the 16-bit element types. They choose an instruction by overload, nothing else.
#pragma once

namespace drope::ptx {

struct BFloat16 {};
struct Float16 {};

}  // namespace drope::ptx
