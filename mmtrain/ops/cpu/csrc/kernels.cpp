// All kernels for one instruction set. This file is compiled once per instruction set, with
// -DMMT_ISA=<name> -DMMT_LANES=<floats per vector>. dispatch.cpp selects one at run time.
#include "conv.h"
#include "dropout.h"
#include "exp_rate.h"
#include "matmul.h"
#include "mix_backward.h"
#include "mix_forward.h"
#include "scan_backward.h"
#include "scan_forward.h"
#include "weighted_sum.h"

#define MMT_CONCAT_(a, b) a##_##b
#define MMT_CONCAT(a, b) MMT_CONCAT_(a, b)
#define MMT_EXPORT(name, Args) \
    extern "C" __attribute__((visibility("hidden"))) int MMT_CONCAT(name, MMT_ISA)(const Args *args) { return MMT_ISA::name(*args); }
MMT_KERNELS(MMT_EXPORT)
