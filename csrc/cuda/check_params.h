// What no kernel serves, said before any launch. Python refuses the same calls with better words;
// this guards whoever calls the C++ functions.
#pragma once

#include "attention_params.h"

namespace drope::cuda {

// All throw std::invalid_argument.
void check_params(const AttentionForwardParams& params);
void check_params(const AttentionBackwardParams& params);
void check_params(const AttentionDecodeParams& params);

}  // namespace drope::cuda
