#include "cpu/parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace drope {
namespace {

// One parallel_for in progress; lives on its caller's stack.
struct Job {
  Job(TaskRef job_task, int64_t tasks, int helpers)
      : task(job_task), num_tasks(tasks), max_helpers(helpers) {}

  TaskRef task;
  int64_t num_tasks;
  int max_helpers;
  std::atomic<int64_t> next_task{0};
  int num_joined = 0;   // helpers that ever took part; guarded by the pool's mutex
  int num_working = 0;  // helpers inside run(); guarded by the pool's mutex
  std::exception_ptr error;
  std::once_flag error_once;

  void run(int worker) {
    try {
      for (int64_t i = next_task++; i < num_tasks; i = next_task++) task(i, worker);
    } catch (...) {
      std::call_once(error_once, [this] { error = std::current_exception(); });
      next_task = num_tasks;
    }
  }
};

class Pool {
 public:
  void run(Job& job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start_threads(job.max_helpers);
      jobs_.push_back(&job);
    }
    job_added_.notify_all();
    job.run(0);
    std::unique_lock<std::mutex> lock(mutex_);
    jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
    helper_left_.wait(lock, [&] { return job.num_working == 0; });
  }

 private:
  void start_threads(int count) {
    for (; num_threads_ < count; ++num_threads_) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        return;  // the caller does what missing threads would have done
      }
    }
  }

  Job* joinable_job() {
    for (Job* job : jobs_) {
      if (job->num_joined < job->max_helpers && job->next_task < job->num_tasks) return job;
    }
    return nullptr;
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      Job* job = nullptr;
      job_added_.wait(lock, [&] { return (job = joinable_job()) != nullptr; });
      const int worker = ++job->num_joined;
      ++job->num_working;
      lock.unlock();
      job->run(worker);
      lock.lock();
      --job->num_working;
      helper_left_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable job_added_, helper_left_;
  std::vector<Job*> jobs_;
  int num_threads_ = 0;
};

std::mutex pool_mutex;
Pool* pool = nullptr;  // never deleted: detached threads wait on it until the process ends

// A forked child has the pool's memory but none of its threads, so it forgets the pool.
void register_fork_handlers() {
  pthread_atfork([] { pool_mutex.lock(); }, [] { pool_mutex.unlock(); },
                 [] {
                   pool = nullptr;
                   pool_mutex.unlock();
                 });
}

Pool& the_pool() {
  static std::once_flag registered;
  std::call_once(registered, register_fork_handlers);
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (pool == nullptr) pool = new Pool;
  return *pool;
}

}  // namespace

void parallel_for(int num_threads, int64_t num_tasks, TaskRef task) {
  const int64_t helpers = std::min<int64_t>(num_threads, num_tasks) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < num_tasks; ++i) task(i, 0);
    return;
  }
  Job job(task, num_tasks, static_cast<int>(helpers));
  the_pool().run(job);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace drope
