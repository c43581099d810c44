#include "idle.h"

#if defined(__linux__)
#include <sched.h>
#include <unistd.h>

#include <cstdio>
#include <memory>
#endif

namespace specmoe {

#if defined(__linux__)

double idle_ns() {
  cpu_set_t usable;
  if (sched_getaffinity(0, sizeof usable, &usable) != 0) return -1.0;  // more cores than it holds
  const std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen("/proc/stat", "re"), &std::fclose);
  if (!file) return -1.0;
  double ticks = 0.0;
  bool is_found = false;
  for (char line[512]; std::fgets(line, sizeof line, file.get()) != nullptr;) {
    int core = 0;
    double idle = 0.0, waiting = 0.0;
    if (std::sscanf(line, "cpu%d %*f %*f %*f %lf %lf", &core, &idle, &waiting) != 3) continue;
    if (core < 0 || core >= CPU_SETSIZE || !CPU_ISSET(core, &usable)) continue;
    ticks += idle + waiting;
    is_found = true;
  }
  return is_found ? ticks * (1e9 / static_cast<double>(sysconf(_SC_CLK_TCK))) : -1.0;
}

#else

double idle_ns() { return -1.0; }

#endif

}  // namespace specmoe
