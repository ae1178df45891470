// Define how weights are packed for one instruction set.

namespace NAMESPACE {

constexpr int LAYOUT[] = {LANES, VECTORS, Product<bfloat16>::STEP};

}  // namespace NAMESPACE
