"""Describes the machine of a benchmark, and times contenders in turn."""

import os
import statistics
import time


def describe():
  """Prints processor, load, versions and the kernel each BLAS has chosen."""
  import threadpoolctl

  with open("/proc/cpuinfo") as file:
    model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
  print(f"processor: {model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
  for pool in threadpoolctl.threadpool_info():
    name = os.path.basename(pool["filepath"])
    print(f"  {pool['internal_api']} {pool.get('version')} kernel {pool.get('architecture')} "
          f"threads {pool['num_threads']} ({name})")


def in_turn(contenders, repeats):
  """Median wall and processor seconds of each of {name: function}.

  A round calls each once; the first round is not counted. Processor seconds (of all threads) show less of waiting for
  memory and other threads, but hardly depend on what else runs on the machine.
  """
  times = {name: [] for name in contenders}
  for turn in range(repeats + 1):
    for name, run in contenders.items():
      start = time.perf_counter(), time.process_time()
      run()
      if turn:
        times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
  return {name: tuple(map(statistics.median, zip(*values))) for name, values in times.items()}


def milliseconds(run, wait, calls=20):
  """Median time of a call; `wait` ends a group of calls."""
  for _ in range(3):
    wait(run())
  groups = []
  for _ in range(5):
    start = time.perf_counter()
    for _ in range(calls):
      result = run()
    wait(result)
    groups.append((time.perf_counter() - start) / calls)
  return 1e3 * statistics.median(groups)
