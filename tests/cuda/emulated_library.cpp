// The emulator's own operator: how the launches after it are to be run.
#include "bindings.h"

namespace {

void emulate(int64_t seed, const std::string& policy) {
  using emulator::Policy;
  STD_TORCH_CHECK(policy == "random" || policy == "early" || policy == "late", "policy is ", policy,
                  ", expected random, early or late");
  emulator::options.seed = seed;
  emulator::options.policy = policy == "early" ? Policy::early : policy == "late" ? Policy::late : Policy::random;
}

}  // namespace

REGISTER_SCHEMAS(MMICL_LIBRARY, m) { m.def("emulate(int seed, str policy) -> ()"); }
REGISTER_KERNELS(MMICL_LIBRARY, CompositeExplicitAutograd, m) { m.impl("emulate", TORCH_BOX(&emulate)); }
