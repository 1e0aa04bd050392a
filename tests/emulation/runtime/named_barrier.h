// PTX ISA, "bar, barrier".
#pragma once

namespace drope::emulation {

void begin_named_barriers();
void bar_arrive(int barrier, int num_threads);
void bar_sync(int barrier, int num_threads);

}  // namespace drope::emulation
