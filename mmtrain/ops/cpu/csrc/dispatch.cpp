// The entry points of the library. They use the best instruction set that the library contains and the machine supports.
#include <string.h>

#include "args.h"

#define MMT_API extern "C" __attribute__((visibility("default")))

#define MMT_DECLARE_FOR(isa, name, Args) extern "C" int name##_##isa(const Args *);
#define MMT_DECLARE(name, Args)                                                             \
    MMT_DECLARE_FOR(baseline, name, Args) MMT_DECLARE_FOR(avx2, name, Args) MMT_DECLARE_FOR(avx512, name, Args)
MMT_KERNELS(MMT_DECLARE)

namespace {
enum Isa { kBaseline, kAvx2, kAvx512 };
const char *const kNames[] = {"baseline", "avx2", "avx512"};

Isa widest() {
#ifdef MMT_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
        return kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
    return kBaseline;
}

Isa current = widest();
}  // namespace

#ifdef MMT_X86
#define MMT_CALL(name)                              \
    current == kAvx512 ? name##_avx512(args)        \
    : current == kAvx2 ? name##_avx2(args)          \
                       : name##_baseline(args)
#else
#define MMT_CALL(name) name##_baseline(args)
#endif
#define MMT_ENTRY(name, Args) \
    MMT_API int mmtrain_##name(const Args *args) { return MMT_CALL(name); }
MMT_KERNELS(MMT_ENTRY)

MMT_API const char *mmtrain_source_hash() { return MMT_SOURCE_HASH; }
MMT_API const char *mmtrain_isa() { return kNames[current]; }
MMT_API int64_t mmtrain_chunk() { return kChunk; }
MMT_API int64_t mmtrain_channel_pad() { return kChannelPad; }

// Select an instruction set, for tests and comparisons; "auto" selects the best. Returns 0 on success, 1 if unsupported.
MMT_API int mmtrain_set_isa(const char *name) {
    if (!strcmp(name, "auto")) return current = widest(), 0;
    for (int i = 0; i <= widest(); ++i)
        if (!strcmp(name, kNames[i])) return current = static_cast<Isa>(i), 0;
    return 1;
}
