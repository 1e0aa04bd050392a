// One pool of threads for every CPU kernel: started at the first call that can use it, rebuilt in a
// forked child, shared by concurrent callers.
#pragma once

#include <cstdint>

namespace drope {

// A borrowed callable (task, worker): it must outlive the call that it is passed to.
class TaskRef {
 public:
  // Implicit, so that a lambda can be passed.
  template <class Callable>
  TaskRef(const Callable& callable)
      : object_(&callable), call_([](const void* object, int64_t task, int worker) {
          (*static_cast<const Callable*>(object))(task, worker);
        }) {}
  void operator()(int64_t task, int worker) const { call_(object_, task, worker); }

 private:
  const void* object_;
  void (*call_)(const void*, int64_t, int);
};

// Runs task(i, worker) for every i in [0, num_tasks) on at most num_threads threads, the caller
// among them, and returns when all are done. Tasks start in order; worker is in [0, num_threads)
// and no two threads of a call share it. The first exception of a task is rethrown here.
void parallel_for(int num_threads, int64_t num_tasks, TaskRef task);

}  // namespace drope
