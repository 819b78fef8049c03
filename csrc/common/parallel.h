// Thread counts come from the caller: OpenMP's own count is per Python thread, torch's is not.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#else
inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }
#endif
