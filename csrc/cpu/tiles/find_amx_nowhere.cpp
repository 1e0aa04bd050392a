// For processors without AMX, and for systems whose way to ask for it is not known here.
#include "cpu/tiles/serves.h"

namespace drope {

AmxFacts find_amx() { return {false, 0}; }

}  // namespace drope
