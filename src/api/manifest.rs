//! A local manifest file.
