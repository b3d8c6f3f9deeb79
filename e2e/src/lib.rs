//! Real servers, workloads and independent comparison for the tests, the demo and the benchmarks.
